"""Climbing the divergence from the clean prediction, in the precision of the training or in another one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from alum_kernels.adversarial.passes import TaskPass
from alum_kernels.adversarial.predictions import Prediction, sum_and_gradients
from alum_kernels.adversarial.step import Step


def ascend_divergence(step: Step, task: TaskPass) -> Tensor | None:
    """Climb the divergence; its sum over rows and heads at the start, None without telemetry."""
    config = step.config
    fixed = [part.detached() for part in task.predictions]
    if config.steps > 1:
        fixed = [part.with_products() for part in fixed]
    start = None
    for turn in range(config.steps):
        leaves = step.leaves()
        with step.precision():
            sums, grads = _gradients(step, leaves, fixed)
        if turn == 0 and config.telemetry:
            start = torch.stack(sums).sum()
        if turn == 0 and step.check_signal and config.ascent_dtype is not None:
            _, exact = _gradients(step, leaves, fixed)
            step.telemetry.add(ascent_cosine=_cosine(grads, exact))
        step.perturbation.climb(grads)
    return start


def _gradients(step: Step, leaves: list[Tensor], fixed: list[Prediction]) -> tuple[list[Tensor], list[Tensor]]:
    with torch.enable_grad():
        adv = step.predict(step.inner, lambda index, output: leaves[index].clone())
    sums, grads = sum_and_gradients(adv, fixed, leaves, step.config, step.config.ascent_divergence)
    return sums, step.required(grads)


def _cosine(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Of the gradients to all sites together; 0 where one of them is zero."""
    a, b = (torch.cat([tensor.flatten().double() for tensor in side]) for side in (left, right))
    return torch.nn.functional.cosine_similarity(a, b, dim=0)
