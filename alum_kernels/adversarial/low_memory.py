"""A step that holds the graph of one pass at a time.

    clean pass            no graph; its prediction b and the tensors at the sites are kept
    ascent, K times       one graph
    adversarial pass      J(a, b) and its gradients to a, b and the head; the backward of a, and its graph is freed
    clean pass again      the task's loss, and alpha dJ/db where b is; one backward, the caller's

The gradient is that of the exact step, since J reaches the model through a and b alone. It costs one forward more.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alum_kernels.adversarial.ascent import ascend_divergence
from alum_kernels.adversarial.at_the_end import report_divergence, weighted
from alum_kernels.adversarial.passes import TaskPass
from alum_kernels.adversarial.predictions import FP16_GRAD_SCALE, Prediction, mean_divergences, where_gathered
from alum_kernels.adversarial.row_losses import widened
from alum_kernels.adversarial.step import Replace, Step, StepResult


def train_in_low_memory(step: Step, backward: Callable[[Tensor], None]) -> StepResult:
    """The adversarial pass and its backward, then the clean pass, whose backward is the caller's.

    The loss that is returned has the value of the whole step's and the gradient of the clean pass's share.
    """
    config = step.config
    with torch.no_grad():
        before = step.run_clean()
    start = ascend_divergence(step, before) if config.steps > 0 else None
    perturb = partial(step.perturbation.perturb, telemetry=config.telemetry, keep_delta=step.keeps_final_delta)
    with step.without_sync():
        divergence, gradients = _train_adversarial_pass(step, before, start, perturb, backward)
    del before  # its predictions are as large as those of the pass that follows
    step.restore()
    task = step.run_clean()
    loss = step.weights.divergence * divergence
    if step.weights.clean > 0:
        loss = loss + step.weights.clean * task.loss
    rest = _carrier([part.values for part in task.predictions], gradients)
    if rest is not None:
        loss = loss + rest
    elif step.weights.clean == 0:
        loss = loss + 0 * task.loss  # nothing is left to train, and the caller has something to differentiate
    if config.telemetry:
        step.telemetry.add(**step.perturbation.figures())
    return StepResult(loss=loss, task_loss=task.loss, outputs=task.outputs, divergence=divergence)


def _train_adversarial_pass(
    step: Step, before: TaskPass, start: Tensor | None, perturb: Replace, backward: Callable[[Tensor], None]
) -> tuple[Tensor, list[Tensor | None]]:
    """Adversarial pass and its backward; the divergence, and the gradients of its share of the loss to b."""
    adv = step.predict(step.inner, perturb)
    fixed, clean = ([_leaf(part) for part in side] for side in (adv, before.predictions))
    means, divergence, share, of_clean = where_gathered(adv, partial(_differentiated, step, adv, fixed, clean, before))
    report_divergence(step, start, fixed, clean, means, divergence)
    del adv, fixed, clean, means  # the backward frees what it is done with
    if share is not None:
        backward(share)
    return divergence, of_clean


def _differentiated(
    step: Step, adv: list[Prediction], fixed: list[Prediction], clean: list[Prediction], before: TaskPass
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor | None]]:
    """Mean divergences, the step's divergence, what carries its gradients to a and the head, and those to b.

    Args:
        adv: a, in the graph of its pass.
        fixed, clean: a and b as beginnings of a graph.
        before: the clean pass.
    """
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
    gradients = [None if grad is None else widened(grad) / scale for grad in found]
    heads = len(fixed)
    share = _carrier([part.values for part in adv] + weights, gradients[:heads] + gradients[2 * heads :])
    return means.detach(), divergence.detach(), share, gradients[heads : 2 * heads]


def _leaf(part: Prediction) -> Prediction:
    """The same prediction as the beginning of a graph."""
    return replace(part, values=part.values.detach().requires_grad_())


def _head_parameters(predictions: Sequence[Prediction]) -> list[Tensor]:
    """Trained parameters by which a divergence goes beside the predictions: those of a linear head."""
    modules = [part.linear.projection for part in predictions if part.linear is not None]
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def _carrier(values: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor | None:
    """Zero, whose gradients to the values are these, times whatever a trainer multiplies the loss by.

    None where nothing is trained. (<value, gradient> would have them too, but hold two more tensors of each size.)
    """
    pairs = [
        (value, grad) for value, grad in zip(values, gradients, strict=True) if grad is not None and value.requires_grad
    ]
    return _Carrier.apply([grad for _, grad in pairs], *(value for value, _ in pairs)) if pairs else None


class _Carrier(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradients, *values):
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [value.dtype for value in values]
        return gradients[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, *((grad * upstream).to(dtype) for grad, dtype in pairs)
