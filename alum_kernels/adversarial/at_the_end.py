"""A step that trains at the end of its ascent.

    clean pass            the task's loss and the prediction; the tensor e at each site is kept
    ascent, K times       x = e + delta as a leaf; g = gradient to x alone, no parameter's
    final pass            e + Pi(delta + step normalise(g)) inside the model: e's gradient reaches the embeddings
    one loss, one backward

With K = 1, delta_0 is never stored: the ascent draws it again from the seed. The final pass goes on from the clean
pass's e, so that the embeddings are looked up, and differentiated, once. (Not with independent dropout, where what lies
before a site differs from pass to pass; and only an ``nn.Embedding`` is skipped.)
"""

from functools import partial

import torch
from torch import Tensor

from alum_kernels.adversarial.ascent import ascend_divergence
from alum_kernels.adversarial.passes import TaskPass
from alum_kernels.adversarial.predictions import Prediction, divergence_sum, mean_divergences
from alum_kernels.adversarial.proximal import BregmanProximal
from alum_kernels.adversarial.step import Step, StepResult


def train_at_the_end(step: Step, proximal: BregmanProximal | None) -> StepResult:
    """Clean pass, ascent and final pass; one loss for one backward."""
    config = step.config
    task = proximity = adversarial_loss = divergence = start = None
    climbs_divergence = step.weights.perturbs and config.climbs_divergence
    if step.weights.clean > 0 or step.weights.divergence > 0 or climbs_divergence or proximal is not None:
        task = step.run_clean()
    parts = [] if task is None or step.weights.clean == 0 else [step.weights.clean * task.loss]
    if proximal is not None:
        proximity = step.proximity(task, proximal)
        parts.append(config.proximal * proximity)

    if step.weights.perturbs and config.steps > 0:
        start = ascend_divergence(step, task) if climbs_divergence else _ascend_task(step)
    # one forward a backward is the wrapper's: the clean pass, where there is one
    model = step.model if task is None else step.inner
    perturb = partial(step.perturbation.perturb, telemetry=config.telemetry, keep_delta=step.keeps_final_delta)
    if step.weights.adversarial > 0:
        final = step.run_task(model, perturb)
        adv, adversarial_loss = final.predictions, final.loss
        parts.append(step.weights.adversarial * final.loss)
        task = final if task is None else task
    elif step.weights.divergence > 0:
        adv = step.predict(model, perturb)
    if step.weights.divergence > 0:
        means = mean_divergences(adv, task.predictions, config)
        divergence = weighted(means, task)
        parts.append(step.weights.divergence * divergence)
        climbed = start if config.ascent == "divergence" else None
        report_divergence(step, climbed, adv, task.predictions, means, divergence)
    if config.telemetry:
        figures = step.perturbation.figures()
        if start is not None and config.ascent == "task" and adversarial_loss is not None:
            figures["task_increase"] = adversarial_loss - start
        if proximity is not None:
            figures["proximal"] = proximity
        step.telemetry.add(**figures)
    return StepResult(
        loss=sum(parts[1:], parts[0]),
        task_loss=task.loss,
        outputs=task.outputs,
        divergence=divergence,
        adversarial_loss=adversarial_loss,
        proximal=proximity,
    )


def weighted(means: Tensor, task: TaskPass) -> Tensor:
    """The divergence of a step, of the mean over the perturbed rows of each head."""
    return means.sum() if task.shares is None else (means * task.shares).sum()


def report_divergence(
    step: Step,
    start: Tensor | None,
    adv: list[Prediction],
    clean: list[Prediction],
    means: Tensor,
    divergence: Tensor,
) -> None:
    """Figures of the divergence at delta_K; ``start`` is the sum at delta_0, None where it was not climbed."""
    if step.config.telemetry:
        climbed = {} if start is None else {"start": start, "end": _sum_of(step, adv, clean, means)}
        step.telemetry.add(divergence=divergence, **climbed)
    if step.check_signal:
        _check_signal(step, adv, clean)


def _ascend_task(step: Step) -> Tensor:
    """Climb the task's loss; the loss at the start."""
    start = None
    for _ in range(step.config.steps):
        # without a clean pass, the first pass tells what is perturbed
        leaves = dict(enumerate(step.leaves())) if step.perturbation.recorded else {}

        def replace(index: int, output: Tensor, leaves: dict[int, Tensor] = leaves) -> Tensor:
            if index not in leaves:
                step.perturbation.record(index, output.detach())
                leaves[index] = step.perturbation.leaf(index)
            return leaves[index].clone()

        with torch.enable_grad():
            loss = step.run_task(step.inner, replace).loss
        if step.ranks is not None:
            loss = loss / step.ranks.ranks  # the sum over ranks is the mean that is climbed
        step.perturbation.climb(step.gradients(loss, [leaves[index] for index in range(len(leaves))]))
        start = loss.detach() if start is None else start
    return start


def _sum_of(step: Step, adv: list[Prediction], clean: list[Prediction], means: Tensor) -> Tensor:
    """The divergence that the ascent climbed, summed over compared rows and heads."""
    config = step.config
    if config.ascent_divergence == config.divergence:
        return sum(mean * side.rows() for mean, side in zip(means, clean, strict=True))
    return divergence_sum(adv, [part.detached() for part in clean], config, config.ascent_divergence)


def _check_signal(step: Step, adv: list[Prediction], clean: list[Prediction]) -> None:
    fixed = [part.detached() for part in clean]
    with torch.no_grad():
        half = step.predict(step.inner, step.perturbation.halved)
    at_full, at_half = (divergence_sum(side, fixed, step.config, step.config.divergence) for side in (adv, half))
    step.telemetry.add(signal_full=at_full, signal_half=at_half)
