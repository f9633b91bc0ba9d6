"""One step over one batch: its weights, the passes that it can run, and what they give."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from alum_kernels.adversarial.config import AdversarialConfig
from alum_kernels.adversarial.dropout_masks import KeptMasks
from alum_kernels.adversarial.first_layer import FirstLayer
from alum_kernels.adversarial.hooks import PerturbationHooks, Replace
from alum_kernels.adversarial.input_gradients import input_gradients
from alum_kernels.adversarial.lower_layers import LowerLayers
from alum_kernels.adversarial.model_state import device_of, unwrap
from alum_kernels.adversarial.passes import Part, TaskPass
from alum_kernels.adversarial.perturbation import Perturbation
from alum_kernels.adversarial.predictions import FP16_GRAD_SCALE, Prediction, in_fp16, mean_divergences
from alum_kernels.adversarial.proximal import BregmanProximal
from alum_kernels.adversarial.ranks import RankWeights
from alum_kernels.adversarial.row_losses import widened
from alum_kernels.adversarial.sample_losses import SampleLosses
from alum_kernels.adversarial.schedule import Progress
from alum_kernels.adversarial.sub_batch import SubBatch
from alum_kernels.adversarial.telemetry import Telemetry


class RepeatedState(Protocol):
    """The state of dropout's generators at some moment."""

    def restore(self) -> None:
        """The generators go on as they did from that moment."""


class Weights(NamedTuple):
    """What the terms of the config's loss weigh in one step, its schedules included."""

    clean: float
    adversarial: float
    divergence: float
    linearity: float
    linearity_gradient: float

    @property
    def perturbs(self) -> bool:
        """Whether there is anything to perturb for."""
        return any(self[1:])


def weights_of(config: AdversarialConfig, progress: Progress) -> Weights:
    """What each term weighs now: before the start, and between the steps that have an adversary, the task's alone."""
    interval = config.adversarial_interval
    if not progress.started(config.start):
        return Weights(1.0, 0.0, 0.0, 0.0, 0.0)
    if progress.step % interval:
        return Weights(config.clean_weight, 0.0, 0.0, 0.0, 0.0)
    factor = progress.value("alpha_schedule", config.alpha_schedule) * interval
    return Weights(
        clean=config.clean_weight,
        adversarial=config.adversarial_weight * interval,
        divergence=factor * config.alpha,
        linearity=factor * config.linearity,
        linearity_gradient=factor * config.linearity_gradient,
    )


class StepResult(NamedTuple):
    """The loss to differentiate, its parts as they are in the graph (None: no such part), and the model's output."""

    loss: Tensor
    task_loss: Tensor
    outputs: Any
    divergence: Tensor | None = None
    adversarial_loss: Tensor | None = None
    proximal: Tensor | None = None
    linearity: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """One batch, the ways to run the model on it, and its perturbation.

    Attributes:
        config: the method.
        model: as it is trained, ``DistributedDataParallel`` included.
        hooks: where it is perturbed.
        whole: the batch.
        task: runs the model that it is given, this one or the one inside it, on some samples with their labels.
        perturbation: of this batch.
        random: state of dropout's generators that every pass begins with; None lets each pass draw its own.
        telemetry: takes the figures.
        weights: of this step.
        sample_losses: the task's loss of each sample; None where the method takes the model's own alone.
        check_signal: measure the divergence at half the perturbation as well.
        precision: context of the ascent's passes.
        sub_batch: the samples that are perturbed; None for all.
        lower: layers below the perturbed site that perturbed passes skip; None for none.
        ranks: what this rank's means weigh among those of others; None where they count alone.
        masks: what the clean pass draws for dropout and perturbed passes take; None where each draws it again.
        sharded: parameters are gathered in forward passes only, so no module runs outside of one.
        clean_tensors: the tensor at each site in the clean pass, part of its graph; the perturbed passes take them up.
            Empty where they make their own.
    """

    config: AdversarialConfig
    model: nn.Module
    hooks: PerturbationHooks
    whole: Part
    task: Callable[[nn.Module, Part], TaskPass]
    perturbation: Perturbation
    random: RepeatedState | None
    telemetry: Telemetry
    weights: Weights
    sample_losses: SampleLosses | None = None
    check_signal: bool = False
    precision: Callable[[], AbstractContextManager[None]] = nullcontext
    sub_batch: SubBatch | None = None
    lower: LowerLayers | None = None
    ranks: RankWeights | None = None
    masks: KeptMasks | None = None
    sharded: bool = False
    clean_tensors: list[Tensor] = field(default_factory=list, init=False)

    @property
    def keeps_final_delta(self) -> bool:
        """Whether the last perturbation is needed after its pass."""
        return self.check_signal or self.config.delta_lifetime > 1

    @property
    def part(self) -> Part:
        """What the perturbed passes run on."""
        return self.whole if self.sub_batch is None else self.sub_batch.chosen

    @property
    def inner(self) -> nn.Module:
        """The model inside ``DistributedDataParallel``, whose passes are not the ones that it waits for."""
        return unwrap(self.model)

    def run_clean(self) -> TaskPass:
        """The task at the clean point, which the perturbation then knows."""
        with nullcontext() if self.masks is None else self.masks.kept():
            if self.sub_batch is not None and self.sub_batch.splits:
                result, embeds = self._run_clean_parts(self.sub_batch)
            else:
                with self._watching(), self.hooks.recording() as embeds:
                    result = self.task(self.model, self.whole)
                if self.sub_batch is not None:
                    result, embeds = self.sub_batch.selected(result, embeds)
        result = self.among_ranks(result)
        for index, tensor in enumerate(embeds):
            self.perturbation.record(index, tensor.detach())
        # what independent dropout did before the site is not what it does in the next pass
        if torch.is_grad_enabled() and (self.lower is not None or self.config.dropout != "independent"):
            self.clean_tensors[:] = embeds
        return result

    def _run_clean_parts(self, sub: SubBatch) -> tuple[TaskPass, list[Tensor]]:
        """The task at the clean point in two parts, from one look-up of the embeddings where there can be one."""
        ids = self.whole.inputs.get("input_ids")
        embeds = None if self.sharded else self.hooks.look_up(ids)

        def looked_up(part: Part, index: Tensor) -> AbstractContextManager[None]:
            if embeds is None:
                return nullcontext()
            return self.hooks.looked_up(part.inputs["input_ids"], embeds.index_select(0, index))

        with looked_up(sub.chosen, sub.chosen_index), self._watching(), self.hooks.recording() as of_chosen:
            chosen = self.task(self.model, sub.chosen)
        with looked_up(sub.rest, sub.rest_index):
            rest = self.task(self.inner, sub.rest)
        return sub.joined(chosen, rest), of_chosen

    def run_task(self, model: nn.Module, replace: Replace) -> TaskPass:
        """The task at a perturbed point."""
        with self._perturbed(replace):
            result = self.task(model, self.part)
        self.hooks.check_calls()
        return self.among_ranks(result)

    def among_ranks(self, task: TaskPass) -> TaskPass:
        """A pass over the whole batch, whose means weigh as much as this rank has of the labels of all ranks."""
        return task if self.ranks is None else self.ranks.of_task(task)

    def predict(self, model: nn.Module, replace: Replace) -> list[Prediction]:
        """What ``model`` predicts at a perturbed point."""
        with self._perturbed(replace):
            return self.part.passes.run(lambda: model(**self.part.inputs))

    def proximity(self, task: TaskPass, proximal: BregmanProximal) -> Tensor:
        """Divergence of the clean prediction from the teacher's, which is constant."""
        self.restore()
        with torch.no_grad(), self._masks_repeated():
            teacher = self.whole.passes.run(lambda: proximal.forward(self.whole.inputs))
        means = mean_divergences(task.predictions, teacher, self.config, gradient="detach_clean")
        return means.sum() if task.shares is None else (means * task.shares).sum()

    def run_first_layer(self, first_layer: FirstLayer, upstream: Tensor) -> list[Tensor]:
        """Gradients of ``upstream`` . (first layer's output) to the perturbed tensors at the next point."""
        leaves = self.leaves()
        with torch.enable_grad(), self._perturbed(lambda index, output: leaves[index].clone()):
            return first_layer.gradient(lambda: self.inner(**self.part.inputs), leaves, upstream)

    def leaves(self) -> list[Tensor]:
        """The perturbed tensors at the next point, as leaves."""
        return [self.perturbation.leaf(index) for index in range(len(self.hooks.names))]

    def gradients(
        self, losses: Tensor, points: Sequence[Tensor], weights: Tensor | None = None, *, create_graph: bool = False
    ) -> list[Tensor]:
        """Gradients of a loss, or of ``weights`` . losses, to the perturbed tensors alone, fp32 (fp64 for fp64).

        Those of passes that compute in fp16 are raised by a power of two on their way, which is taken out again.
        """
        scale = FP16_GRAD_SCALE if in_fp16(points[0]) else 1.0
        upstream = torch.full_like(losses, scale) if weights is None else weights * scale
        grads = input_gradients(losses, list(points), upstream, create_graph=create_graph, retain_graph=create_graph)
        wide = [widened(grad) for grad in self.required(grads)]
        return wide if scale == 1.0 else [grad / scale for grad in wide]

    def required(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradients to the perturbed tensors; raises ValueError, naming the module, where there is none."""
        for name, grad in zip(self.hooks.names, grads, strict=True):
            if grad is None:
                raise ValueError(
                    f"modules: the predictions do not depend on the perturbed output of {name}; "
                    "a module that another perturbed module replaces cannot be perturbed as well"
                )
        return list(grads)

    def without_sync(self) -> AbstractContextManager[None]:
        """Within the context a backward is not summed over the processes."""
        return self.model.no_sync() if isinstance(self.model, nn.parallel.DistributedDataParallel) else nullcontext()

    def restore(self) -> None:
        """Dropout's generators as the clean pass found them, where every pass begins so."""
        if self.random is not None:
            self.random.restore()

    def _watching(self) -> AbstractContextManager[None]:
        return nullcontext() if self.lower is None else self.lower.watched(device_of(self.inner))

    def _masks_repeated(self) -> AbstractContextManager[None]:
        return nullcontext() if self.masks is None else self.masks.repeated()

    @contextmanager
    def _perturbed(self, replace: Replace) -> Iterator[None]:
        """A pass with ``replace`` at the sites, and dropout as in the clean pass."""
        self.restore()
        lower, known = self.lower, self.clean_tensors or None

        def at_site(index: int, tensor: Tensor) -> Tensor | None:
            if self.random is not None:
                lower.random.restore()
            return replace(index, tensor)

        with (
            self._masks_repeated(),
            nullcontext() if lower is None else lower.skipped(),
            self.hooks.replacing(replace if lower is None else at_site, known),
        ):
            yield
