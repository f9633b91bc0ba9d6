"""A step that trains along its ascent: FreeLB, the fast gradient method, YOPO, free adversarial training.

K + 1 passes at delta_0 .. delta_K; the backward of each gives the gradients of the parameters and the one that delta
climbs at once. The last backward is the caller's.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from alum_kernels.adversarial.first_layer import FirstLayer
from alum_kernels.adversarial.step import Step, StepResult


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
    share = step.weights.adversarial / (1 if config.backward == "replay" else config.steps + 1)
    losses: list[Tensor] = []
    for _ in range(config.steps):
        grads: dict[int, Tensor] = {}
        upstream: list[Tensor] = []
        watched = partial(_perturb_and_watch, step, grads)
        with nullcontext() if update is not None else step.without_sync():
            if first_layer is None:
                task = step.run_task(step.model, watched)
            else:
                task = first_layer.with_gradient(partial(step.run_task, step.model, watched), upstream)
            backward(share * task.loss)
        losses.append(task.loss.detach())
        if first_layer is None:
            perturbation.climb(step.required([grads.get(index) for index in range(len(step.hooks.names))]))
        else:
            perturbation.stay()
            for _inner in range(config.inner_steps):
                perturbation.climb(step.run_first_layer(first_layer, upstream[-1]))
        if update is not None:
            update()
    last = step.run_task(step.model, partial(perturbation.perturb, telemetry=config.telemetry))
    loss = share * last.loss
    if config.backward == "accumulate" and losses:
        loss = loss + share * torch.stack(losses).sum()  # the step's whole loss, for the eye; no gradient
    losses.append(last.loss.detach())
    mean = torch.stack(losses).mean()
    if config.telemetry:
        increase = {"task_increase": losses[-1] - losses[0]} if config.steps else {}
        step.telemetry.add(**increase, **perturbation.figures())
    return StepResult(loss=loss, task_loss=mean, outputs=last.outputs, adversarial_loss=mean)


def _perturb_and_watch(step: Step, grads: dict[int, Tensor], index: int, output: Tensor) -> Tensor:
    """The live tensor at the next point, whose gradient a backward leaves in ``grads``."""
    perturbed = step.perturbation.perturb(index, output, last=False)
    if not perturbed.requires_grad:  # nothing before the site is trained
        perturbed.requires_grad_()
    perturbed.register_hook(partial(grads.__setitem__, index))
    return perturbed.clone()  # a model may change what it gets in place
