"""The passes of a training step, and what they add up to.

    trained at the end    clean pass; ascent, K times: x = e + delta as a leaf, g = gradient to x alone, no parameter's;
                          final pass at e + Pi(delta + step normalise(g)) inside the model. One loss, one backward.
    trained on the way    K + 1 passes at delta_0 .. delta_K, each with a backward that gives the parameters' gradients
                          and g at once (FreeLB, free adversarial training, YOPO, FGM); the last one is the caller's.

With K = 1 and training at the end, delta_0 is never stored: the ascent draws it again from the seed.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alum_kernels.adversarial.config import AdversarialConfig
from alum_kernels.adversarial.first_layer import FirstLayer
from alum_kernels.adversarial.hooks import PerturbationHooks, RandomState, unwrap
from alum_kernels.adversarial.passes import Passes
from alum_kernels.adversarial.perturbation import Perturbation
from alum_kernels.adversarial.predictions import (
    FP16_GRAD_SCALE,
    Prediction,
    divergence_sum,
    mean_divergences,
    sum_and_gradients,
)
from alum_kernels.adversarial.proximal import BregmanProximal
from alum_kernels.adversarial.sample_losses import SampleLosses
from alum_kernels.adversarial.telemetry import Telemetry

Replace = Callable[[int, Tensor], Tensor | None]


class TaskPass(NamedTuple):
    """One pass that computes the task's loss: the loss, the model's output, and what it predicted."""

    loss: Tensor
    outputs: Any
    predictions: list[Prediction]


class StepResult(NamedTuple):
    """The loss to differentiate, and its parts."""

    loss: Tensor
    task_loss: Tensor
    divergence: Tensor
    adversarial_loss: Tensor | None
    proximal: Tensor | None
    outputs: Any


@dataclass(frozen=True)
class Step:
    """One batch, the ways to run the model on it, and its perturbation.

    Attributes:
        config: the method.
        model: as it is trained, ``DistributedDataParallel`` included.
        hooks: where it is perturbed.
        inputs: its arguments without labels.
        task: runs it on the batch with its labels.
        passes: reads predictions; None where none are compared.
        perturbation: of this batch.
        random: state of dropout's generators that every pass begins with; None lets each pass draw its own.
        telemetry: takes the figures.
        alpha, clean_weight, adversarial_weight: weights of the divergence, the task's loss and the perturbed task's
            loss in this step.
        strength: factor of the weights of local linearity in this step.
        sample_losses: the task's loss of each sample; None where the method takes the model's own alone.
        check_signal: measure the divergence at half the perturbation as well.
    """

    config: AdversarialConfig
    model: nn.Module
    hooks: PerturbationHooks
    inputs: Mapping[str, Any]
    task: Callable[[], TaskPass]
    passes: Passes | None
    perturbation: Perturbation
    random: RandomState | None
    telemetry: Telemetry
    alpha: float
    clean_weight: float
    adversarial_weight: float
    strength: float = 1.0
    sample_losses: SampleLosses | None = None
    check_signal: bool = False

    def run_clean(self) -> TaskPass:
        """The task at the clean point, which the perturbation then knows."""
        with self.hooks.recording() as embeds:
            result = self.task()
        for index, tensor in enumerate(embeds):
            self.perturbation.record(index, tensor)
        return result

    def run_task(self, replace: Replace) -> TaskPass:
        """The task at a perturbed point."""
        self._restore()
        with self.hooks.replacing(replace):
            result = self.task()
        self.hooks.check_calls()
        return result

    def predict(self, model: nn.Module, replace: Replace) -> list[Prediction]:
        """What ``model`` predicts at a perturbed point."""
        self._restore()
        with self.hooks.replacing(replace):
            return self.passes.run(lambda: model(**self.inputs))

    def predict_by(self, forward: Callable[[], Any]) -> list[Prediction]:
        """What another way to run the model predicts at the clean point."""
        self._restore()
        with torch.no_grad():
            return self.passes.run(forward)

    def run_first_layer(self, first_layer: FirstLayer, upstream: Tensor) -> list[Tensor]:
        """Gradients of ``upstream`` . (first layer's output) to the perturbed tensors at the next point."""
        leaves = self.leaves()
        self._restore()
        with torch.enable_grad(), self.hooks.replacing(lambda index, output: leaves[index].clone()):
            return first_layer.gradient(lambda: unwrap(self.model)(**self.inputs), lambda: leaves, upstream)

    def leaves(self) -> list[Tensor]:
        """The perturbed tensors at the next point, as leaves."""
        return [self.perturbation.leaf(index) for index in range(len(self.hooks.names))]

    def without_sync(self) -> AbstractContextManager[None]:
        """Within the context a backward is not summed over the processes."""
        return self.model.no_sync() if isinstance(self.model, nn.parallel.DistributedDataParallel) else nullcontext()

    def _restore(self) -> None:
        if self.random is not None:
            self.random.restore()


def train_at_the_end(step: Step, proximal: BregmanProximal | None) -> StepResult:
    """Clean pass, ascent and final pass; one loss for one backward."""
    config = step.config
    task = proximity = adversarial_loss = start = None
    perturbs = step.alpha > 0 or step.adversarial_weight > 0
    climbs_divergence = perturbs and config.climbs_divergence
    if step.clean_weight > 0 or step.alpha > 0 or climbs_divergence or proximal is not None:
        task = step.run_clean()
    parts = [] if task is None or step.clean_weight == 0 else [step.clean_weight * task.loss]
    if proximal is not None:
        proximity = proximity_to_teacher(step, task, proximal)
        parts.append(config.proximal * proximity)

    if perturbs:
        start = _ascend_divergence(step, task) if climbs_divergence else _ascend_task(step)
    perturb = partial(step.perturbation.perturb, telemetry=config.telemetry, keep_delta=step.check_signal)
    if step.adversarial_weight > 0:
        final = step.run_task(perturb)
        adv, adversarial_loss = final.predictions, final.loss
        parts.append(step.adversarial_weight * final.loss)
        task = final if task is None else task
    elif step.alpha > 0:
        adv = step.predict(step.model, perturb)
    divergence = torch.zeros((), device=task.loss.device)
    if step.alpha > 0:
        means = mean_divergences(adv, task.predictions, config)
        divergence = means.sum()
        parts.append(step.alpha * divergence)
    if config.telemetry:
        figures = step.perturbation.figures()
        if step.alpha > 0 and start is not None and config.ascent == "divergence":
            figures |= {"start": start, "end": _sum_of(step, adv, task.predictions, means)}
        elif start is not None and config.ascent == "task" and adversarial_loss is not None:
            figures |= {"task_increase": adversarial_loss - start}
        if step.alpha > 0:
            figures["divergence"] = divergence
        if proximity is not None:
            figures["proximal"] = proximity
        step.telemetry.add(steps=torch.ones_like(divergence), **figures)
    if step.check_signal and step.alpha > 0:
        _check_signal(step, adv, task.predictions)
    return StepResult(sum(parts[1:], parts[0]), task.loss, divergence, adversarial_loss, proximity, task.outputs)


def proximity_to_teacher(step: Step, task: TaskPass, proximal: BregmanProximal) -> Tensor:
    """Divergence of the clean prediction from the teacher's, which is constant."""
    teacher = step.predict_by(lambda: proximal.forward(step.inputs))
    return mean_divergences(task.predictions, teacher, step.config.replace(gradient="detach_clean")).sum()


def train_on_the_way(
    step: Step,
    backward: Callable[[Tensor], None],
    update: Callable[[], None] | None,
    first_layer: FirstLayer | None,
) -> StepResult:
    """K + 1 passes along the ascent; all but the last are differentiated here, by ``backward``.

    The loss that is returned has the value of the whole step's and the gradient of the last pass's share.
    ``update`` is called after each of these backwards, if it is given.
    """
    config, perturbation = step.config, step.perturbation
    share = step.adversarial_weight / (1 if config.backward == "replay" else config.steps + 1)
    losses: list[Tensor] = []
    for _ in range(config.steps):
        grads: dict[int, Tensor] = {}
        upstream: list[Tensor] = []
        watched = partial(_perturb_and_watch, step, grads)
        with nullcontext() if update is not None else step.without_sync():
            if first_layer is None:
                task = step.run_task(watched)
            else:
                task = first_layer.with_gradient(partial(step.run_task, watched), upstream)
            backward(share * task.loss)
        losses.append(task.loss.detach())
        if first_layer is None:
            perturbation.climb([_present(grads, index, step) for index in range(len(step.hooks.names))])
        else:
            perturbation.stay()
            for _inner in range(config.inner_steps):
                perturbation.climb(step.run_first_layer(first_layer, upstream[-1]))
        if update is not None:
            update()
    last = step.run_task(partial(perturbation.perturb, telemetry=config.telemetry))
    loss = share * last.loss
    if config.backward == "accumulate" and losses:
        loss = loss + share * torch.stack(losses).sum()  # the step's whole loss, for the eye; no gradient
    losses.append(last.loss.detach())
    mean = torch.stack(losses).mean()
    nothing = torch.zeros_like(mean)
    if config.telemetry:
        increase = {"task_increase": losses[-1] - losses[0]} if config.steps else {}
        step.telemetry.add(steps=torch.ones_like(mean), **increase, **perturbation.figures())
    return StepResult(loss, mean, nothing, mean, None, last.outputs)


def _perturb_and_watch(step: Step, grads: dict[int, Tensor], index: int, output: Tensor) -> Tensor:
    """The live tensor at the next point, whose gradient a backward leaves in ``grads``."""
    perturbed = step.perturbation.perturb(index, output, last=False)
    if not perturbed.requires_grad:  # nothing before the site is trained
        perturbed.requires_grad_()
    perturbed.register_hook(partial(grads.__setitem__, index))
    return perturbed


def _present(grads: Mapping[int, Tensor], index: int, step: Step) -> Tensor:
    if index not in grads:
        raise ValueError(
            f"modules: the predictions do not depend on the perturbed output of {step.hooks.names[index]}; "
            "a module that another perturbed module replaces cannot be perturbed as well"
        )
    return grads[index]


def _ascend_divergence(step: Step, task: TaskPass) -> Tensor:
    """Climb the divergence from the clean prediction; the summed divergence at the start."""
    config = step.config
    fixed = [part.detached() for part in task.predictions]
    if config.steps > 1:
        fixed = [part.with_products() for part in fixed]
    start = None
    for _ in range(config.steps):
        leaves = step.leaves()
        with torch.enable_grad():
            adv = step.predict(unwrap(step.model), lambda index, output, leaves=leaves: leaves[index].clone())
        total, grads = sum_and_gradients(adv, fixed, leaves, config, config.ascent_divergence)
        step.perturbation.climb(required_gradients(step, grads))
        start = total if start is None else start
    return start


def _ascend_task(step: Step) -> Tensor | None:
    """Climb the task's loss; the loss at the start, None where nothing climbs."""
    start = None
    for _ in range(step.config.steps):
        # without a clean pass, the first pass tells what is perturbed
        leaves = dict(enumerate(step.leaves())) if step.perturbation.recorded else {}

        def replace(index: int, output: Tensor, leaves: dict[int, Tensor] = leaves) -> Tensor:
            if index not in leaves:
                step.perturbation.record(index, output.detach().clone())
                leaves[index] = step.perturbation.leaf(index)
            return leaves[index].clone()

        with torch.enable_grad():
            loss = step.run_task(replace).loss
        ordered = [leaves[index] for index in range(len(leaves))]
        # a loss's gradient is small where its fp16 activations have lost it
        scale = FP16_GRAD_SCALE if in_fp16(ordered[0]) else 1.0
        grads = torch.autograd.grad(loss * scale, ordered, allow_unused=True)
        grads = [grad if grad is None or scale == 1.0 else grad.float() / scale for grad in grads]
        step.perturbation.climb(required_gradients(step, grads))
        start = loss.detach() if start is None else start
    return start


def required_gradients(step: Step, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients to the perturbed tensors; raises ValueError, naming the module, where there is none."""
    given = {index: grad for index, grad in enumerate(grads) if grad is not None}
    return [_present(given, index, step) for index in range(len(grads))]


def in_fp16(leaf: Tensor) -> bool:
    """Whether a pass from this tensor computes in fp16."""
    device = leaf.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return autocast or leaf.dtype == torch.float16


def _sum_of(step: Step, adv: list[Prediction], clean: list[Prediction], means: Tensor) -> Tensor:
    """The divergence that the ascent climbed, summed over compared rows and heads."""
    config = step.config
    if config.ascent_divergence == config.divergence:
        return sum(mean * side.rows() for mean, side in zip(means, clean, strict=True))
    return divergence_sum(adv, [part.detached() for part in clean], config, config.ascent_divergence)


def _check_signal(step: Step, adv: list[Prediction], clean: list[Prediction]) -> None:
    fixed = [part.detached() for part in clean]
    with torch.no_grad():
        half = step.predict(unwrap(step.model), step.perturbation.halved)
    at_full, at_half = (divergence_sum(side, fixed, step.config, step.config.divergence) for side in (adv, half))
    step.telemetry.add(signal_full=at_full, signal_half=at_half)
