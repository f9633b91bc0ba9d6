"""One adversarial training step around an unchanged model.

``run.py`` runs a step; here is what it depends on besides the batch: how far the training is, the seeds of the noise,
the teacher.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from alum_kernels.adversarial.captured import CapturedStep
from alum_kernels.adversarial.config import AdversarialConfig
from alum_kernels.adversarial.heads import Head, head_of
from alum_kernels.adversarial.linear_head import LinearHead
from alum_kernels.adversarial.local_linearity import check_second_derivatives
from alum_kernels.adversarial.model_state import RandomState, device_of, has_static_graph, original, unwrap
from alum_kernels.adversarial.out_of_memory import memory_advice
from alum_kernels.adversarial.output import AdversarialOutput
from alum_kernels.adversarial.parallelism import check_parallelism
from alum_kernels.adversarial.proximal import Teaching
from alum_kernels.adversarial.run import (
    Backward,
    Draw,
    LossFunction,
    Plan,
    RunTask,
    Samples,
    StepRunner,
    TaskOptions,
    Update,
)
from alum_kernels.adversarial.samples import sample_count
from alum_kernels.adversarial.schedule import Progress
from alum_kernels.adversarial.seeds import NoiseSeeds
from alum_kernels.adversarial.step import RepeatedState, weights_of
from alum_kernels.adversarial.telemetry import Telemetry
from alum_kernels.ops.checks import check_count, check_process_group


class AdversarialObjective:
    """Wraps a model so that one call computes the adversarial training loss; the training loop stays as it is.

    Args:
        model: a module called as ``model(**batch)``; ``DistributedDataParallel`` around it is seen through, and
            ``torch.distributed.fsdp.fully_shard`` may be applied to it.
        config: the method and its constants.
        head: a name of :data:`alum_kernels.adversarial.heads.HEADS`; None recognises it from the model's class.
        loss: ``loss(outputs, batch)`` of the task; None takes ``outputs.loss``, which the model computes from labels,
            or the same cross-entropy without the logits.
        process_group: of the ranks whose gradients are averaged, such as ``torch.distributed.group.WORLD``. Labels and
            compared rows are then counted over all of them, so that the averaged gradient is that of the whole batch
            where ranks have different counts too; every rank must make every step. A loss and its parts are the rank's
            share times the number of ranks: the mean over the ranks is the whole batch's. None divides by the rank's
            own counts. A loss of your own must be a mean over the labels that the head has in the batch.

    A language model whose head is one linear projection is trained without its logits, on the hidden states of the
    compared rows, and a hook on the model sees the logits of a few classes only; where that is not possible it goes
    through the logits, and a warning says why. ``config.fused_head`` decides otherwise.

    Methods that train on every pass of the ascent (``config.backward``), and ``config.memory="low"``, need
    :meth:`backward`; a teacher (``config.proximal``) needs :meth:`follow`; schedules by the share of the training need
    :meth:`set_progress`.

    Raises:
        ValueError: no head or no input embeddings are recognised, a fused head was demanded and cannot be, or the model
            is distributed in a way that is not supported, such as ``DataParallel``.
        TypeError: ``process_group`` is none.

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
        process_group: "distributed.ProcessGroup | None" = None,
    ) -> None:
        self.model = model
        self.config = config
        check_process_group("process_group", process_group)
        self.process_group = process_group
        check_parallelism(model, config, None if process_group is None else process_group.size())
        inner = original(model)
        self.head = _head_of(inner, head, config)
        if config.climbs_linearity:
            check_second_derivatives(inner)
        self.telemetry = Telemetry()
        self._runner = StepRunner(model, config, self.head, loss, self.telemetry, process_group)
        if loss is not None:
            self._runner.refuse_other_losses("loss")
        self._seeds = NoiseSeeds(config.seed)
        self._steps = self._perturbed_steps = 0
        self._progress: Progress | None = None
        self._teaching = Teaching(model, config, self._now)

    @property
    def linear_head(self) -> LinearHead | None:
        """The head by which a language model is trained without its logits; None where it goes through them."""
        return self._runner.fused.linear

    def __call__(self, **batch: Any) -> AdversarialOutput:
        """The loss of one batch, with a fresh draw of noise; call ``.loss.backward()`` on the result."""
        return self.forward(batch)

    def backward(
        self,
        batch: Mapping[str, Any],
        scale: float | Tensor = 1.0,
        backward: Backward | None = None,
        update: Update | None = None,
        samples: Samples | None = None,
        *,
        seed: Tensor | None = None,
        sample_offset: int | None = None,
    ) -> dict[str, Tensor]:
        """All passes of one batch, backward included; gradients are in ``.grad``, as after ``loss.backward()``.

        Args:
            batch: arguments of the model, labels included.
            scale: factor on the loss, such as one over the number of accumulated batches.
            backward: how to differentiate, such as ``accelerator.backward``; None calls ``Tensor.backward``.
            update: a step of the optimizer, with zeroed gradients after it, for methods that replay a batch
                (``config.backward == "replay"``); called between replays, the update after the last is the caller's.
            samples, seed, sample_offset: as of :meth:`forward`.

        Returns:
            Detached device scalars ``loss``, ``task_loss`` and ``divergence``, before ``scale``.
        """
        differentiate = backward or Tensor.backward

        def scaled(loss: Tensor) -> None:
            differentiate(loss * scale)

        with self.memory_advice(batch):
            output = self.forward(
                batch, seed=seed, sample_offset=sample_offset, backward=scaled, update=update, samples=samples
            )
            scaled(output.loss)
        return output.figures()

    def capture(self, example_batch: Mapping[str, Any], optimizer: torch.optim.Optimizer | None = None) -> CapturedStep:
        """A whole step as one CUDA graph for each shape of batch.

        Args:
            example_batch: arguments of the model, labels included, as they will come.
            optimizer: becomes part of the step; None leaves the gradients to the caller.

        Returns:
            The step; its ``reason`` says why steps are not captured, where they are not.

        Raises:
            ValueError: the batch has something that is neither a tensor nor hashable.
        """
        return CapturedStep(self, example_batch, optimizer)

    def forward(
        self,
        batch: Mapping[str, Any],
        *,
        run_task: RunTask | None = None,
        standard_loss: bool = False,
        loss_without_logits: bool = False,
        task_keys: Collection[str] = (),
        seed: Tensor | None = None,
        sample_offset: int | None = None,
        delta: Sequence[Tensor] | None = None,
        backward: Backward | None = None,
        update: Update | None = None,
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
            loss_without_logits: the loss of ``run_task`` takes no logits; it comes from what the output projection is
                given, which ``run_task`` calls once with it. Then a linear head compares, and the loss is as it is.
            task_keys: entries of the batch, besides labels, that only ``run_task`` reads and other passes go without.
            seed: one-element int64 tensor, see :meth:`draw_seed`; None draws one. Batches that are accumulated into one
                optimizer step share a seed and differ in ``sample_offset`` (:class:`alum_kernels.NoisePlace`); then
                splitting changes nothing. (Which samples an ``adversarial_fraction`` of p / q chooses stays, if all
                offsets and counts are multiples of q, at most 64; otherwise it is another choice, a share of each
                batch.)
            sample_offset: place of the batch's first sample in the global batch. None is 0, or with a process group
                this rank's number times its samples, as where all ranks have as many.
            delta: a first perturbation for each perturbed module, (B, S, H) fp32 (fp64 for fp64), instead of noise.
            backward: differentiates the loss of every pass but the last, whose loss is returned; needed by methods that
                train on every pass, and by ``memory="low"``.
            update: as in :meth:`backward`.
            samples: an identifier of each sample, such as its index in the dataset, on the host (B ints); needed by
                ``config.delta_lifetime``.

        Returns:
            The loss to differentiate, its parts, and what the model returned.

        Raises:
            ValueError: the model gave no loss, the batch lacks what the head needs, or the method needs an argument,
                :meth:`follow` or :meth:`set_progress` that it did not get.
            RuntimeError: a perturbed module did not run exactly once in a pass.
            torch.OutOfMemoryError, RuntimeError, MemoryError: an allocator's, see :meth:`memory_advice`.
        """
        self._check_call(backward, update, samples)
        if sample_offset is None:
            group = self.process_group
            sample_offset = 0 if group is None else group.rank() * sample_count(batch)
        plan = self.begin_step()
        if seed is None and (plan.weights.perturbs or plan.proximal is not None):
            seed = self.draw_seed()
        draw = Draw(seed, sample_offset, delta, samples)
        options = TaskOptions(run_task, standard_loss, loss_without_logits, frozenset(task_keys), backward, update)
        with self.memory_advice(batch):
            return self.run_step(batch, plan, draw, options)

    def memory_advice(self, batch: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Within the context an allocator's refusal is raised again with the batch and what would need less memory.

        Every step has it; a loop that calls ``loss.backward()`` itself may put it around that. The exception is of the
        same type, and has the original as its cause.
        """
        return memory_advice(batch, self.config, self.model, chunked=self.linear_head is not None)

    def begin_step(self) -> Plan:
        """Count a step, and what the course of the training makes of it."""
        progress = self._now()
        self._steps += 1
        plan = Plan(weights_of(self.config, progress), check_signal=False, proximal=self._teaching.teacher())
        if not plan.weights.perturbs:
            return plan
        self._runner.scale(progress.value("epsilon_schedule", self.config.epsilon_schedule))
        self._perturbed_steps += 1
        interval = self.config.signal_check_interval
        return plan._replace(check_signal=interval > 0 and self._perturbed_steps % interval == 0)

    def run_step(
        self,
        batch: Mapping[str, Any],
        plan: Plan,
        draw: Draw,
        options: TaskOptions,
        random: Callable[[torch.device], RepeatedState] = RandomState,
    ) -> AdversarialOutput:
        """A step as planned.

        Args:
            batch: arguments of the model, labels included.
            plan: of :meth:`begin_step`.
            draw: what the perturbation begins with; its seed may be None where nothing is perturbed.
            options: a trainer's own ways.
            random: makes the state of dropout's generators that passes repeat.
        """
        return AdversarialOutput.of(self._runner.run(self.model, batch, plan, draw, options, random))

    def _check_call(self, backward: Backward | None, update: Update | None, samples: Samples | None) -> None:
        config = self.config
        if config.trains_in_parts and backward is None:
            why = "holds one graph at a time" if config.backward == "final" else "trains on every pass of an ascent"
            raise ValueError(f"backward: {config.method} {why}, call AdversarialObjective.backward")
        if (samples is None) != (config.delta_lifetime == 1):
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

        The teacher begins as the model is now, or as a checkpoint's that was loaded since the last step.

        Raises:
            ValueError: the config has no proximal term, or a checkpoint's teacher has other parameters.
        """
        self._teaching.follow(optimizer)

    def draw_seed(self, device: torch.device | None = None) -> Tensor:
        """The next seed of the noise, a one-element int64 tensor on ``device`` (the model's, if None)."""
        device = device_of(unwrap(self.model)) if device is None else device
        return self._seeds.draw(device)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs so that the noise, dropout and the teacher go on where they stopped.

        Perturbations that are kept for later visits (``delta_lifetime``) are not in it.
        """
        return {
            "generator": self._seeds.get_state(),
            "steps": self._steps,
            "perturbed_steps": self._perturbed_steps,
            "proximal": self._teaching.state_dict(),
            "selects_masks": self._runner.selects_masks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint; a teacher in it is taken up by the one that follows the optimizer.

        Args:
            state: of :meth:`state_dict`.
        """
        self._steps = state["steps"]
        self._perturbed_steps = state.get("perturbed_steps", self._steps)
        self._runner.forget()
        self._runner.selects_masks = state.get("selects_masks", True)
        self._seeds.set_state(state["generator"])
        self._teaching.load_state_dict(state.get("proximal"))

    def remove_hooks(self) -> None:
        """Take the wrapper's hooks off the model and the optimizer; the objective cannot be used afterwards."""
        self._runner.remove()
        self._teaching.stop()

    def _now(self) -> Progress:
        return self._progress or Progress(self._steps)


def _head_of(model: nn.Module, name: str | None, config: AdversarialConfig) -> Head | None:
    """The head that is named, or recognised; a method that compares no predictions does without."""
    if name is not None:
        Head(name)  # a wrong name is refused whatever the method
    try:
        return head_of(model, name)
    except ValueError:
        if config.compares:
            raise
        return None
