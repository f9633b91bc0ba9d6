"""A step that holds the graph of one pass at a time.

    clean pass            no graph; its prediction b and the tensors at the sites are kept
    ascent, K times       one graph
    adversarial pass      J(a, b) and its gradients to a, b and the head; the backward of a, and its graph is freed
    clean pass again      the task's loss and <b, alpha dJ/db>; one backward, the caller's

The gradient is that of the exact step, since J reaches the model through a and b alone. It costs one forward more.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from alum_kernels.adversarial.ascent import ascend_divergence
from alum_kernels.adversarial.at_the_end import report_divergence, weighted
from alum_kernels.adversarial.passes import TaskPass
from alum_kernels.adversarial.predictions import FP16_GRAD_SCALE, Prediction, mean_divergences
from alum_kernels.adversarial.step import Replace, Step, StepResult


def train_in_low_memory(step: Step, backward: Callable[[Tensor], None]) -> StepResult:
    """The adversarial pass and its backward, then the clean pass, whose backward is the caller's.

    The loss that is returned has the value of the whole step's and the gradient of the clean pass's share.
    """
    config = step.config
    with torch.no_grad():
        before = step.run_clean()
    start = ascend_divergence(step, before) if config.steps > 0 else None
    perturb = partial(step.perturbation.perturb, telemetry=config.telemetry, keep_delta=step.keeps_delta)
    with step.without_sync():
        divergence, gradients = _train_adversarial_pass(step, before, start, perturb, backward)
    step.restore()
    task = step.run_clean()
    loss = step.weights.divergence * divergence
    if step.weights.clean > 0:
        loss = loss + step.weights.clean * task.loss
    rest = _products([part.values for part in task.predictions], gradients)
    if rest is not None:
        loss = loss + (rest - rest.detach())
    if config.telemetry:
        step.telemetry.add(**step.perturbation.figures())
    return StepResult(loss=loss, task_loss=task.loss, outputs=task.outputs, divergence=divergence)


def _train_adversarial_pass(
    step: Step, before: TaskPass, start: Tensor | None, perturb: Replace, backward: Callable[[Tensor], None]
) -> tuple[Tensor, list[Tensor | None]]:
    """Adversarial pass and its backward; the divergence, and the gradients of its share of the loss to b.

    <a, dJ/da> has the gradient of J through a, whatever a trainer multiplies the loss by.
    """
    adv = step.predict(step.inner, perturb)
    fixed, clean = ([_leaf(part) for part in side] for side in (adv, before.predictions))
    weights = _head_parameters(adv)
    with torch.enable_grad():
        means = mean_divergences(fixed, clean, step.config)
        divergence = weighted(means, before)
    scale = FP16_GRAD_SCALE if any(part.values.dtype == torch.float16 for part in fixed) else 1.0
    found = torch.autograd.grad(
        scale * step.weights.divergence * divergence,
        [*(part.values for part in fixed), *(part.values for part in clean), *weights],
        allow_unused=True,
    )
    gradients = [None if grad is None else _wide(grad) / scale for grad in found]
    heads = len(fixed)
    share = _products([part.values for part in adv] + weights, gradients[:heads] + gradients[2 * heads :])
    if share is not None:
        backward(share)
    report_divergence(step, start, fixed, clean, means, divergence)
    return divergence.detach(), gradients[heads : 2 * heads]


def _leaf(part: Prediction) -> Prediction:
    """The same prediction as the begin of a graph."""
    return replace(part, values=part.values.detach().clone().requires_grad_())


def _head_parameters(predictions: Sequence[Prediction]) -> list[Tensor]:
    """Trained parameters by which a divergence goes beside the predictions: those of a linear head."""
    modules = [part.linear.projection for part in predictions if part.linear is not None]
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def _products(values: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor | None:
    """Sum of <value, gradient>; None where nothing is trained.

    Where a gradient is zero its value does not count: it may be infinite, of a class that cannot be.
    """
    products = [
        (torch.where(grad == 0, 0, _wide(value)) * grad).sum()
        for value, grad in zip(values, gradients, strict=True)
        if grad is not None and value.requires_grad
    ]
    return sum(products[1:], products[0]) if products else None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
