"""Runs steps on one model: what is perturbed, by which passes, and what is kept from one step to the next."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from alum_kernels.adversarial.ascent_precision import AscentPrecision
from alum_kernels.adversarial.at_the_end import train_at_the_end
from alum_kernels.adversarial.config import AdversarialConfig
from alum_kernels.adversarial.delta_store import DeltaStore
from alum_kernels.adversarial.dropout_masks import DrawsDifferError, KeptMasks, can_keep_masks
from alum_kernels.adversarial.first_layer import FirstLayer
from alum_kernels.adversarial.fused_head import FusedHead
from alum_kernels.adversarial.heads import Head
from alum_kernels.adversarial.hooks import PerturbationHooks
from alum_kernels.adversarial.labels import without_labels
from alum_kernels.adversarial.local_linearity import train_local_linearity
from alum_kernels.adversarial.low_memory import train_in_low_memory
from alum_kernels.adversarial.lower_layers import LowerLayers
from alum_kernels.adversarial.model_state import (
    device_of,
    dropout_off,
    dropout_off_in_backward,
    original,
)
from alum_kernels.adversarial.on_the_way import train_on_the_way
from alum_kernels.adversarial.parallelism import casts_of_each_pass, check_parallelism, is_fully_sharded
from alum_kernels.adversarial.passes import LinearPasses, LogitPasses, Part, TaskPass, loss_of
from alum_kernels.adversarial.perturbation import DeviceConstants, Perturbation
from alum_kernels.adversarial.proximal import BregmanProximal
from alum_kernels.adversarial.ranks import RankCounts, RankWeights
from alum_kernels.adversarial.sample_losses import SampleLosses
from alum_kernels.adversarial.samples import sample_count
from alum_kernels.adversarial.sites import perturbed_sites
from alum_kernels.adversarial.step import RepeatedState, Step, StepResult, Weights
from alum_kernels.adversarial.sub_batch import SubBatch, choose, sub_batch_of
from alum_kernels.adversarial.telemetry import Telemetry

LossFunction = Callable[[Any, Mapping[str, Any]], Tensor]
RunTask = Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, Any]]
Backward = Callable[[Tensor], None]
Update = Callable[[], None]
Samples = Sequence[int] | Tensor
"""Identifiers on the host."""


class Draw(NamedTuple):
    """What a step's perturbation begins with: arguments of :meth:`AdversarialObjective.forward`."""

    seed: Tensor | None
    sample_offset: int
    delta: Sequence[Tensor] | None
    samples: Samples | None

    def identifiers(self, count: int) -> list[int]:
        """Of ``count`` samples.

        Raises:
            ValueError: there are more or less, or they are on a device, which would have to be waited for.
        """
        if isinstance(self.samples, Tensor) and self.samples.device.type != "cpu":
            raise ValueError(f"samples: expected identifiers on the host, got a tensor on {self.samples.device}")
        found = [int(sample) for sample in self.samples]
        if len(found) != count:
            raise ValueError(f"samples: expected {count}, one a sample, got {len(found)}")
        return found


class Plan(NamedTuple):
    """What the course of the training makes of one step.

    Attributes:
        weights: of its terms.
        check_signal: measure the divergence at half the perturbation as well.
        proximal: the teacher, None for none.
    """

    weights: Weights
    check_signal: bool
    proximal: BregmanProximal | None


class TaskOptions(NamedTuple):
    """A trainer's own ways: arguments of :meth:`AdversarialObjective.forward`."""

    run_task: RunTask | None = None
    standard_loss: bool = False
    loss_without_logits: bool = False
    task_keys: frozenset[str] = frozenset()
    backward: Backward | None = None
    update: Update | None = None

    @property
    def own_loss(self) -> bool:
        """Whether the task's loss is the model's own."""
        return self.run_task is None or self.standard_loss

    @property
    def leaves_logits(self) -> bool:
        """Whether the task's loss can do without the model's logits."""
        return self.own_loss or self.loss_without_logits


class StepRunner:
    """What is installed on a model for as long as it is trained, and one step of it.

    Args:
        model: the model.
        config: the method.
        head: what it predicts, None where no predictions are compared.
        loss: the task's, None for the model's own.
        telemetry: takes the figures.
        process_group: labels are counted over it; None for this rank alone.

    Attributes:
        hooks: at the perturbed sites.
        fused: the linear head, where the model is trained without its logits.
        selects_masks: a clean pass over the whole batch draws what perturbed passes over some samples repeat. Tried
            where masks are kept; False from the first step on that shows that the model cannot.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AdversarialConfig,
        head: Head | None,
        loss: LossFunction | None,
        telemetry: Telemetry,
        process_group: "distributed.ProcessGroup | None" = None,
    ) -> None:
        inner = original(model)
        self._inner, self._config, self._head, self._loss, self._telemetry = inner, config, head, loss, telemetry
        self._lower = None
        if config.ascent_depth:
            self._lower = LowerLayers(inner, config.ascent_depth, decoder=config.side == "decoder")
            sites = [self._lower.site]
        else:
            sites = perturbed_sites(inner, config.modules, site=config.site, side=config.side)
        self.hooks = PerturbationHooks(sites)
        self._first_layer = None
        if config.inner_steps:
            self._first_layer = FirstLayer(inner, config.first_layer, decoder=sites[0].decoder)
        self._precision = AscentPrecision(inner, config.ascent_dtype)
        self._constants = DeviceConstants(config)
        self._deltas = DeltaStore(config.delta_lifetime) if config.delta_lifetime > 1 else None
        self.fused = FusedHead(model, head, config, own_loss=loss is None)
        self._counts = None
        if process_group is not None:
            self._counts = RankCounts(process_group, head, config.positions, compares=config.compares)
        self._seen: nn.Module | None = None
        self._sharded = False
        self.selects_masks = True

    def remove(self) -> None:
        """Take the hooks off the model."""
        self.hooks.remove()
        for installed in (self._first_layer, self._lower):
            if installed is not None:
                installed.remove()

    def forget(self) -> None:
        """Keep no perturbation of a sample: they are of another training."""
        if self._deltas is not None:
            self._deltas.clear()

    def scale(self, size: float) -> None:
        """Multiply the perturbation's magnitudes by ``size`` from here on."""
        self._constants.scale(size)

    def run(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        plan: Plan,
        draw: Draw,
        options: TaskOptions,
        random: Callable[[torch.device], RepeatedState],
    ) -> StepResult:
        """One step.

        Args:
            model: as it is trained, ``DistributedDataParallel`` included.
            batch: arguments of the model, labels included.
            plan: what the course of the training makes of it.
            draw: what its perturbation begins with.
            options: a trainer's own ways.
            random: makes the state of dropout's generators that passes repeat.
        """
        config = self._config
        self._see(model)
        if not options.own_loss:
            self.refuse_other_losses("run_task")
        ranks = None
        if self._counts is not None:
            if self._loss is not None or not options.own_loss:
                self._refuse_several_parts()
            ranks = self._counts.weights(batch, device_of(self._inner))
        with (
            dropout_off(model) if config.dropout == "off" else nullcontext(),
            casts_of_each_pass() if self._sharded else nullcontext(),
        ):
            linear = self.fused.of_batch(
                model, batch, options.leaves_logits, own_loss=options.own_loss, sharded=self._sharded
            )

            room = None
            if linear is not None and config.labelled_capacity is not None:
                room = math.ceil(config.labelled_capacity * self._head.tokens.labels(batch).numel())

            def make_part(batch: Mapping[str, Any]) -> Part:
                passes = None
                if linear is not None:
                    passes = LinearPasses(self._head, batch, config.positions, linear, room)
                elif config.compares:
                    passes = LogitPasses(self._head, batch, config.positions)
                inputs = self._inputs(batch)
                return Part(batch, {key: inputs[key] for key in inputs if key not in options.task_keys}, passes)

            def task(model: nn.Module, part: Part) -> TaskPass:
                if linear is not None and not options.own_loss:
                    return TaskPass(*part.passes.run_task(lambda: options.run_task(model, part.batch)))
                if linear is not None:
                    return part.passes.run_clean(lambda: model(**part.inputs))
                loss, outputs = (options.run_task or self._run_task)(model, part.batch)
                return TaskPass(loss, outputs, [] if part.passes is None else part.passes.read(outputs))

            whole = make_part(batch)
            if plan.weights.perturbs or plan.proximal is not None:
                result = self._run_step(model, whole, make_part, task, plan, draw, options, random, ranks)
            else:
                done = task(model, whole)
                done = done if ranks is None else ranks.of_task(done)
                result = StepResult(plan.weights.clean * done.loss, done.loss, done.outputs)
        if config.dropout == "off" and result.loss.requires_grad:
            dropout_off_in_backward(model, result.loss)
        return result

    def _run_step(
        self,
        model: nn.Module,
        whole: Part,
        make_part: Callable[[Mapping[str, Any]], Part],
        task: Callable[[nn.Module, Part], TaskPass],
        plan: Plan,
        draw: Draw,
        options: TaskOptions,
        random: Callable[[torch.device], RepeatedState],
        ranks: RankWeights | None,
    ) -> StepResult:
        config, delta = self._config, draw.delta
        state = random(device_of(self._inner)) if config.dropout == "shared" else None
        keeps = state is not None and self._keeps_masks(model, whole)
        selects = keeps and self._may_select_masks(model)
        sub_batch = None
        if config.adversarial_fraction < 1:
            sub_batch = self._sub_batch(whole, make_part, draw, options, selects=selects)
        # a step that does not perturb (for its teacher alone) neither climbs nor is a visit
        deltas = self._deltas if plan.weights.perturbs else None
        samples = [] if deltas is None else draw.identifiers(sample_count(whole.batch))
        if deltas is not None and (kept := deltas.take(samples)) is not None:
            config, delta = config.replace(steps=0, delta_lifetime=1, ascent_dtype=None), kept
        perturbed = whole if sub_batch is None else sub_batch.chosen
        known = {**perturbed.inputs, **perturbed.batch}
        sample_offset = draw.sample_offset if sub_batch is None else sub_batch.noise_offset
        step = Step(
            config=config,
            model=model,
            hooks=self.hooks,
            whole=whole,
            task=task,
            perturbation=Perturbation(
                config, self._constants, self.hooks.sites, known, draw.seed, sample_offset, delta
            ),
            random=state,
            telemetry=self._telemetry,
            weights=plan.weights,
            sample_losses=self._sample_losses(whole.batch, ranks) if config.climbs_linearity else None,
            check_signal=plan.check_signal,
            precision=self._precision,
            sub_batch=sub_batch,
            lower=self._lower,
            ranks=ranks,
            masks=_masks(sub_batch) if keeps else None,
            sharded=self._sharded,
        )
        try:
            result = self._train(step, plan.proximal, options)
        except DrawsDifferError:
            self.selects_masks = False
        if selects and not self.selects_masks:  # not in the handler, whose error holds the graphs of the first try
            del step
            state.restore()
            return self._run_step(model, whole, make_part, task, plan, draw, options, random, ranks)
        if deltas is not None and step.config.delta_lifetime > 1:
            deltas.put(samples, step.perturbation.final_deltas)
        return result

    def _train(self, step: Step, proximal: BregmanProximal | None, options: TaskOptions) -> StepResult:
        if step.config.climbs_linearity:
            return train_local_linearity(step, proximal)
        if step.config.backward != "final":
            return train_on_the_way(step, options.backward, options.update, self._first_layer)
        if step.config.memory == "low":
            return train_in_low_memory(step, options.backward)
        return train_at_the_end(step, proximal)

    def _sub_batch(
        self,
        whole: Part,
        make_part: Callable[[Mapping[str, Any]], Part],
        draw: Draw,
        options: TaskOptions,
        *,
        selects: bool,
    ) -> SubBatch | None:
        if draw.delta is not None:
            raise ValueError("delta: expected None with adversarial_fraction < 1, which chooses its samples at random")
        choice = choose(whole.batch, self._config.adversarial_fraction, draw.seed, draw.sample_offset)
        if choice is None:
            if self._sharded:
                raise ValueError(
                    "adversarial_fraction: expected a batch of which fewer than all samples are chosen under "
                    f"fully_shard, where every rank makes the same passes, got {sample_count(whole.batch)} samples"
                )
            return None
        shares = self._config.dropout == "shared"
        if shares and not (self._loss is None and options.own_loss):
            raise ValueError(
                "loss: expected the model's own with adversarial_fraction < 1 and dropout='shared', whose clean pass "
                "may run in two parts; dropout='independent' or 'off' takes any"
            )
        return sub_batch_of(self._head, whole, choice, make_part, shares=shares, splits=shares and not selects)

    def _keeps_masks(self, model: nn.Module, whole: Part) -> bool:
        """Whether perturbed passes take the masks that the clean pass drew, which its graph holds as well."""
        return self._config.memory == "high" and torch.is_grad_enabled() and can_keep_masks(model, whole.inputs)

    def _may_select_masks(self, model: nn.Module) -> bool:
        """Whether those of some samples are looked for in those of the batch.

        Not where a step that is begun again would make other passes than those of other ranks.
        """
        return self.selects_masks and model is self._inner and not self._sharded

    def _see(self, model: nn.Module) -> None:
        """Take note of how a model is distributed, when it is first trained."""
        if model is self._seen:
            return
        check_parallelism(model, self._config, None if self._counts is None else self._counts.ranks)
        self._sharded = is_fully_sharded(model)
        self._seen = model

    def _sample_losses(self, batch: Mapping[str, Any], ranks: RankWeights | None) -> SampleLosses:
        return SampleLosses(self._head, batch, None if ranks is None else ranks.samples)

    def refuse_other_losses(self, argument: str) -> None:
        """A loss that is not the head's own cannot be taken apart into samples."""
        if self._config.climbs_linearity:
            raise ValueError(
                f"{argument}: expected the model's own loss with ascent='linearity', which takes the loss of each "
                "sample from logits and labels, got another loss"
            )

    def _refuse_several_parts(self) -> None:
        """A loss that is not the head's own cannot be taken apart into means over different labels."""
        if self._head is not None and len(self._head.parts) > 1:
            raise ValueError(
                f"loss: expected the model's own with a process_group for a {self._head.name} head, whose parts have "
                "different counts of labels, got another loss"
            )

    def _inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return without_labels(batch) if self._head is None else self._head.inputs(batch, self._inner)

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


def _masks(sub_batch: SubBatch | None) -> KeptMasks:
    """For perturbed passes over the whole batch, over some of its samples, or over the first of two parts of it."""
    if sub_batch is None or sub_batch.splits:
        return KeptMasks()
    return KeptMasks(sub_batch.chosen_index, sub_batch.samples)
