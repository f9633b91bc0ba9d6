"""One adversarial training step around an unchanged model.

What a step runs is in ``at_the_end.py``, ``low_memory.py``, ``on_the_way.py`` and ``local_linearity.py``; here are its
loss and its state. A language model's predictions are compared without its logits where its head allows it
(``fused_head.py``).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alum_kernels.adversarial.ascent_precision import AscentPrecision
from alum_kernels.adversarial.at_the_end import train_at_the_end
from alum_kernels.adversarial.config import AdversarialConfig
from alum_kernels.adversarial.delta_store import DeltaStore
from alum_kernels.adversarial.first_layer import FirstLayer
from alum_kernels.adversarial.fused_head import FusedHead
from alum_kernels.adversarial.heads import Head, detect_head
from alum_kernels.adversarial.hooks import PerturbationHooks
from alum_kernels.adversarial.labels import without_labels
from alum_kernels.adversarial.linear_head import LinearHead
from alum_kernels.adversarial.local_linearity import check_second_derivatives, train_local_linearity
from alum_kernels.adversarial.low_memory import train_in_low_memory
from alum_kernels.adversarial.lower_layers import LowerLayers
from alum_kernels.adversarial.model_state import (
    RandomState,
    device_of,
    dropout_off,
    dropout_off_in_backward,
    has_static_graph,
    unwrap,
)
from alum_kernels.adversarial.on_the_way import train_on_the_way
from alum_kernels.adversarial.output import AdversarialOutput
from alum_kernels.adversarial.passes import LinearPasses, LogitPasses, Part, TaskPass, loss_of
from alum_kernels.adversarial.perturbation import DeviceConstants, Perturbation
from alum_kernels.adversarial.proximal import BregmanProximal, Teaching
from alum_kernels.adversarial.sample_losses import SampleLosses
from alum_kernels.adversarial.schedule import Progress
from alum_kernels.adversarial.seeds import NoiseSeeds
from alum_kernels.adversarial.sites import perturbed_sites
from alum_kernels.adversarial.step import Step, StepResult, weights_of
from alum_kernels.adversarial.sub_batch import SubBatch, choose, sub_batch_of
from alum_kernels.adversarial.telemetry import Telemetry
from alum_kernels.ops.checks import check_count

LossFunction = Callable[[Any, Mapping[str, Any]], Tensor]
RunTask = Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, Any]]
Backward = Callable[[Tensor], None]
Samples = Sequence[int] | Tensor
"""Identifiers on the host."""


class Draw(NamedTuple):
    """What a step's perturbation begins with: arguments of :meth:`AdversarialObjective.forward`."""

    seed: Tensor | None
    sample_offset: int
    delta: Sequence[Tensor] | None
    samples: Samples | None

    def identifiers(self) -> list[int]:
        """Of the samples; raises ValueError where they are on a device, which would have to be waited for."""
        if isinstance(self.samples, Tensor):
            if self.samples.device.type != "cpu":
                raise ValueError(f"samples: expected identifiers on the host, got a tensor on {self.samples.device}")
            return self.samples.tolist()
        return [int(sample) for sample in self.samples]


class AdversarialObjective:
    """Wraps a model so that one call computes the adversarial training loss; the training loop stays as it is.

    Args:
        model: a module called as ``model(**batch)``; ``DistributedDataParallel`` around it is seen through.
        config: the method and its constants.
        head: a name of :data:`alum_kernels.adversarial.heads.HEADS`; None recognises it from the model's class.
        loss: ``loss(outputs, batch)`` of the task; None takes ``outputs.loss``, which the model computes from labels,
            or the same cross-entropy without the logits.

    A language model whose head is one linear projection is trained without its logits, on the hidden states of the
    compared rows, and a hook on the model sees the logits of a few classes only; where that is not possible it goes
    through the logits, and a warning says why. ``config.fused_head`` decides otherwise.

    Methods that train on every pass of the ascent (``config.backward``) need :meth:`backward`; a teacher
    (``config.proximal``) needs :meth:`follow`; schedules by the share of the training need :meth:`set_progress`.

    Raises:
        ValueError: no head or no input embeddings are recognised, or a fused head was demanded and cannot be.

    Example:
        >>> import torch
        >>> from alum_kernels import AdversarialConfig, AdversarialObjective
        >>> class Classifier(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed, self.out = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 3)
        ...     def forward(self, input_ids):
        ...         return self.out(self.embed(input_ids).tanh().mean(1))
        >>> adversarial = AdversarialObjective(
        ...     Classifier(),
        ...     AdversarialConfig.alum_finetuning(modules=("embed",)),
        ...     head="classification",
        ...     loss=lambda logits, batch: torch.nn.functional.cross_entropy(logits, batch["labels"]),
        ... )
        >>> batch = {"input_ids": torch.randint(50, (4, 6)), "labels": torch.randint(3, (4,))}
        >>> adversarial(**batch).loss.backward()
    """

    def __init__(
        self,
        model: nn.Module,
        config: AdversarialConfig,
        *,
        head: str | None = None,
        loss: LossFunction | None = None,
    ) -> None:
        self.model = model
        self.config = config
        inner = unwrap(model)
        self.head = _head_of(inner, head, config)
        if config.climbs_linearity:
            check_second_derivatives(inner)
        if loss is not None:
            self._refuse_other_losses("loss")
        self.telemetry = Telemetry()
        self._loss = loss
        self._lower = None
        if config.ascent_depth:
            self._lower = LowerLayers(inner, config.ascent_depth, decoder=config.side == "decoder")
            sites = [self._lower.site]
        else:
            sites = perturbed_sites(inner, config.modules, site=config.site, side=config.side)
        self._hooks = PerturbationHooks(sites)
        self._first_layer = None
        if config.inner_steps:
            self._first_layer = FirstLayer(inner, config.first_layer, decoder=self._hooks.sites[0].decoder)
        self._precision = AscentPrecision(inner, config.ascent_dtype)
        self._seeds = NoiseSeeds(config.seed)
        self._constants = DeviceConstants(config)
        self._steps = 0
        self._progress: Progress | None = None
        self._teaching = Teaching(model, config, lambda: self._progress or Progress(self._steps))
        self._deltas = DeltaStore(config.delta_lifetime) if config.delta_lifetime > 1 else None
        self._fused = FusedHead(model, self.head, config, own_loss=loss is None)

    @property
    def linear_head(self) -> LinearHead | None:
        """The head by which a language model is trained without its logits; None where it goes through them."""
        return self._fused.linear

    def __call__(self, **batch: Any) -> AdversarialOutput:
        """The loss of one batch, with a fresh draw of noise; call ``.loss.backward()`` on the result."""
        return self.forward(batch)

    def backward(
        self,
        batch: Mapping[str, Any],
        scale: float | Tensor = 1.0,
        backward: Backward | None = None,
        update: Callable[[], None] | None = None,
        samples: Samples | None = None,
    ) -> dict[str, Tensor]:
        """All passes of one batch, backward included; gradients are in ``.grad``, as after ``loss.backward()``.

        Args:
            batch: arguments of the model, labels included.
            scale: factor on the loss, such as one over the number of accumulated batches.
            backward: how to differentiate, such as ``accelerator.backward``; None calls ``Tensor.backward``.
            update: a step of the optimizer, with zeroed gradients after it, for methods that replay a batch
                (``config.backward == "replay"``); called between replays, the update after the last is the caller's.
            samples: as of :meth:`forward`.

        Returns:
            Detached device scalars ``loss``, ``task_loss`` and ``divergence``, before ``scale``.
        """
        differentiate = backward or Tensor.backward
        output = self.forward(batch, backward=lambda loss: differentiate(loss * scale), update=update, samples=samples)
        differentiate(output.loss * scale)
        return {"loss": output.loss.detach(), "task_loss": output.task_loss, "divergence": output.divergence}

    def forward(
        self,
        batch: Mapping[str, Any],
        *,
        run_task: RunTask | None = None,
        standard_loss: bool = False,
        seed: Tensor | None = None,
        sample_offset: int = 0,
        delta: Sequence[Tensor] | None = None,
        backward: Backward | None = None,
        update: Callable[[], None] | None = None,
        samples: Samples | None = None,
    ) -> AdversarialOutput:
        """The loss of one batch.

        Args:
            batch: arguments of the model, labels included.
            run_task: a trainer's own way to run a model, giving (task loss, output); called with this model, or with
                the one inside ``DistributedDataParallel``, and the batch or some samples of it. None runs
                ``model(**batch)``.
            standard_loss: the loss of ``run_task`` is the model's own mean over the labels, so that a linear head may
                stand in for it.
            seed: one-element int64 tensor, see :meth:`draw_seed`; None draws one. Batches that are accumulated into one
                optimizer step share a seed and differ in ``sample_offset``; then splitting changes nothing.
            sample_offset: place of the batch's first sample in the global batch.
            delta: a first perturbation for each perturbed module, (B, S, H) fp32 (fp64 for fp64), instead of noise.
            backward: differentiates the loss of every pass but the last, whose loss is returned; needed by methods that
                train on every pass.
            update: as in :meth:`backward`.
            samples: an identifier of each sample, such as its index in the dataset, on the host (B ints); needed by
                ``config.delta_lifetime``.

        Returns:
            The loss to differentiate, its parts, and what the model returned.

        Raises:
            ValueError: the model gave no loss, the batch lacks what the head needs, or the method needs an argument,
                :meth:`follow` or :meth:`set_progress` that it did not get.
            RuntimeError: a perturbed module did not run exactly once in a pass.
        """
        config = self.config
        self._check_call(backward, update, samples)
        own_loss = run_task is None or standard_loss
        if not own_loss:
            self._refuse_other_losses("run_task")
        with dropout_off(self.model) if config.dropout == "off" else nullcontext():
            linear = self._fused.of_batch(self.model, batch, own_loss)

            def make_part(batch: Mapping[str, Any]) -> Part:
                passes = LogitPasses(self.head, batch, config.positions) if config.compares else None
                if linear is not None:
                    passes = LinearPasses(self.head, batch, config.positions, linear, config.labelled_capacity)
                return Part(batch, self._inputs(batch), passes)

            def task(model: nn.Module, part: Part) -> TaskPass:
                if linear is not None:
                    return TaskPass(*part.passes.run_clean(lambda: model(**part.inputs)))
                loss, outputs = (run_task or self._run_task)(model, part.batch)
                return TaskPass(loss, outputs, [] if part.passes is None else part.passes.read(outputs))

            draw = Draw(seed, sample_offset, delta, samples)
            result = self._run_step(make_part, batch, task, draw, backward, update)
        if config.dropout == "off" and result.loss.requires_grad:
            dropout_off_in_backward(self.model, result.loss)
        return AdversarialOutput.of(result)

    def _check_call(
        self, backward: Backward | None, update: Callable[[], None] | None, samples: Samples | None
    ) -> None:
        config = self.config
        if config.trains_in_parts and backward is None:
            why = "holds one graph at a time" if config.backward == "final" else "trains on every pass of an ascent"
            raise ValueError(f"backward: {config.method} {why}, call AdversarialObjective.backward")
        if (samples is None) != (self._deltas is None):
            wanted = "an identifier of each sample" if samples is None else "None"
            raise ValueError(f"samples: expected {wanted} with delta_lifetime {config.delta_lifetime}")
        if (update is not None) != (config.backward == "replay"):
            wanted = (
                "an optimizer step between the replays" if update is None else "None: only 'replay' methods take one"
            )
            raise ValueError(f"update: expected {wanted}, got {'None' if update is None else 'one'}")
        if config.trains_in_parts and has_static_graph(self.model):
            raise ValueError(
                f"model: expected DistributedDataParallel without static_graph for {config.method}, whose steps have "
                "several backwards"
            )

    def _run_step(
        self,
        make_part: Callable[[Mapping[str, Any]], Part],
        batch: Mapping[str, Any],
        task: Callable[[nn.Module, Part], TaskPass],
        draw: "Draw",
        backward: Backward | None,
        update: Callable[[], None] | None,
    ) -> StepResult:
        config, device = self.config, device_of(unwrap(self.model))
        progress = self._progress or Progress(self._steps)
        self._steps += 1
        weights = weights_of(config, progress)
        proximal = self._teaching.teacher()
        if not weights.perturbs and proximal is None:
            loss, outputs, *_ = task(self.model, make_part(batch))
            return StepResult(weights.clean * loss, loss, outputs)
        self._constants.scale(progress.value("epsilon_schedule", config.epsilon_schedule))
        seed = self.draw_seed(device) if draw.seed is None else draw.seed
        whole = make_part(batch)
        sub_batch = self._sub_batch(whole, make_part, seed, draw) if config.adversarial_fraction < 1 else None
        delta = draw.delta
        if self._deltas is not None and (kept := self._deltas.take(draw.identifiers())) is not None:
            config, delta = config.replace(steps=0, delta_lifetime=1, ascent_dtype=None), kept
        perturbed = whole if sub_batch is None else sub_batch.chosen
        known = {**perturbed.inputs, **perturbed.batch}
        interval = config.signal_check_interval
        step = Step(
            config=config,
            model=self.model,
            hooks=self._hooks,
            whole=whole,
            task=task,
            perturbation=Perturbation(
                config, self._constants, self._hooks.sites, known, seed, draw.sample_offset, delta
            ),
            random=RandomState(device) if config.dropout == "shared" else None,
            telemetry=self.telemetry,
            weights=weights,
            sample_losses=SampleLosses(self.head, batch) if config.climbs_linearity else None,
            check_signal=interval > 0 and self._steps % interval == 0,
            precision=self._precision,
            sub_batch=sub_batch,
            lower=self._lower,
        )
        result = self._train(step, proximal, backward, update)
        if step.config.delta_lifetime > 1:
            self._deltas.put(draw.identifiers(), step.perturbation.final_deltas)
        return result

    def _train(
        self,
        step: Step,
        proximal: BregmanProximal | None,
        backward: Backward | None,
        update: Callable[[], None] | None,
    ) -> StepResult:
        if step.config.climbs_linearity:
            return train_local_linearity(step, proximal)
        if step.config.backward != "final":
            return train_on_the_way(step, backward, update, self._first_layer)
        return train_in_low_memory(step, backward) if step.config.memory == "low" else train_at_the_end(step, proximal)

    def _sub_batch(
        self, whole: Part, make_part: Callable[[Mapping[str, Any]], Part], seed: Tensor, draw: "Draw"
    ) -> SubBatch | None:
        if draw.delta is not None:
            raise ValueError("delta: expected None with adversarial_fraction < 1, which chooses its samples at random")
        indices = choose(whole.batch, self.config.adversarial_fraction, seed, draw.sample_offset)
        if indices is None:
            return None
        splits = self.config.dropout == "shared"
        if splits and self._loss is not None:
            raise ValueError(
                "loss: expected the model's own with adversarial_fraction < 1 and dropout='shared', whose clean pass "
                "runs in two parts; dropout='independent' or 'off' takes any"
            )
        return sub_batch_of(self.head, whole, indices, make_part, splits=splits)

    def set_progress(self, step: int, total: int | None = None) -> None:
        """Tell schedules how far the training is.

        Args:
            step: optimizer steps made so far. Until this is called, each forward counts as one.
            total: optimizer steps of the whole training; needed where a schedule speaks of shares of it.
        """
        check_count("step", step)
        if total is not None:
            check_count("total", total)
        self._progress = Progress(step, total)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the teacher of the proximal term follow the model: it is updated after steps of this optimizer.

        The teacher begins as the model is now.

        Raises:
            ValueError: the config has no proximal term, or a checkpoint's teacher has other parameters.
        """
        self._teaching.follow(optimizer)

    def _refuse_other_losses(self, argument: str) -> None:
        """A loss that is not the head's own cannot be taken apart into samples."""
        if self.config.climbs_linearity:
            raise ValueError(
                f"{argument}: expected the model's own loss with ascent='linearity', which takes the loss of each "
                "sample from logits and labels, got another loss"
            )

    def draw_seed(self, device: torch.device | None = None) -> Tensor:
        """The next seed of the noise, a one-element int64 tensor on ``device`` (the model's, if None)."""
        device = device_of(unwrap(self.model)) if device is None else device
        return self._seeds.draw(device)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs so that the noise, and the teacher, go on where they stopped."""
        return {
            "generator": self._seeds.get_state(),
            "steps": self._steps,
            "proximal": self._teaching.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint; a teacher in it is taken up by the one that follows the optimizer."""
        self._steps = state["steps"]
        self._seeds.set_state(state["generator"])
        self._teaching.load_state_dict(state.get("proximal"))

    def remove_hooks(self) -> None:
        """Take the wrapper's hooks off the model and the optimizer; the objective cannot be used afterwards."""
        self._hooks.remove()
        if self._first_layer is not None:
            self._first_layer.remove()
        if self._lower is not None:
            self._lower.remove()
        self._teaching.stop()

    def _inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return without_labels(batch) if self.head is None else self.head.inputs(batch, self.model)

    def _run_task(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        if self._loss is not None:
            outputs = model(**self._inputs(batch))
            return self._loss(outputs, batch), outputs
        outputs = model(**batch)
        loss = loss_of(outputs)
        if loss is None:
            raise ValueError(
                "batch: expected 'labels', since the model computed no loss; "
                f"got {', '.join(batch) or 'an empty batch'}. Pass loss= if the loss is your own"
            )
        return loss, outputs


def _head_of(model: nn.Module, name: str | None, config: AdversarialConfig) -> Head | None:
    """The head that is named, or recognised; a method that compares no predictions does without."""
    if name is not None:
        return Head(name)
    try:
        return detect_head(model)
    except ValueError:
        if config.compares:
            raise
        return None
