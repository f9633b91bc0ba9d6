"""How far the task's loss is from linear around the clean embeddings, as a term of the training loss.

    l_i        the task's loss of sample i (``sample_losses.py``)             g_i = dl_i/de at the clean embeddings e
    r_i(delta) = l_i(e + delta) - l_i(e) - delta . g_i                        gamma_i = |r_i|
    delta <- Pi(delta + step normalise(sign(r_i) (dl_i/de(e + delta) - g_i)))                      K times, from noise
    loss = clean_weight L(e) + linearity mean_i gamma_i(delta_K) + linearity_gradient mean_i |delta_K . g_i|

g_i stays in the graph, so the backward of the loss runs through a backward: the clean pass must be differentiable
twice. Delta is constant there, so the ops that make it need no second derivative. At delta = 0, r and its gradient are
0: the ascent has to begin at noise.

A step has K + 2 forwards, a backward to e that keeps its graph, K backwards to e + delta alone, and the caller's.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from alum_kernels.adversarial.predictions import Prediction
from alum_kernels.adversarial.proximal import BregmanProximal
from alum_kernels.adversarial.sample_losses import SampleLosses
from alum_kernels.adversarial.step import Replace, Step, StepResult, TaskPass


@dataclass(frozen=True)
class Expansion:
    """The first-order expansion of every sample's loss in the perturbation.

    Attributes:
        losses: (B,) at the clean embeddings.
        embeds: the clean (rows, S, H) tensor at each site, detached; a sample has one row or several.
        gradients: of each sample's loss to its rows of ``embeds``, fp32 (fp64 for fp64).
    """

    losses: Tensor
    embeds: list[Tensor]
    gradients: list[Tensor]

    def detached(self) -> "Expansion":
        return Expansion(self.losses.detach(), self.embeds, [grad.detach() for grad in self.gradients])

    def slope(self, points: list[Tensor]) -> Tensor:
        """(B,) delta . g, delta being the part of the perturbation that the embeddings' dtype holds."""
        return sum(map(self._product, points, self.embeds, self.gradients))

    def remainder(self, losses: Tensor, points: list[Tensor]) -> Tensor:
        """(B,) what is left of ``losses`` at the perturbed ``points``."""
        return losses - self.losses - self.slope(points)

    def over_rows(self, values: Tensor, index: int) -> Tensor:
        """(rows, 1, 1) of (B,) values of the samples, for the tensors at a site."""
        rows = self.embeds[index].shape[0] // self.losses.shape[0]
        return values.repeat_interleave(rows).view(-1, 1, 1)

    def _product(self, point: Tensor, embeds: Tensor, gradient: Tensor) -> Tensor:
        delta = point.detach().to(gradient.dtype) - embeds.to(gradient.dtype)
        return (delta * gradient).reshape(self.losses.shape[0], -1).sum(1)


def check_second_derivatives(model: torch.nn.Module) -> None:
    """Raises ValueError for a model whose attention is known to have no second derivative."""
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if isinstance(attention, str) and "flash" in attention:
        raise ValueError(
            f"model: expected attn_implementation 'sdpa' or 'eager' with ascent='linearity', got {attention!r}, which "
            "has no second derivative"
        )


def train_local_linearity(step: Step, proximal: BregmanProximal | None) -> StepResult:
    """Clean pass, ascent of gamma, and final pass; one loss for one backward.

    Attention runs as plain matrix products (``SDPBackend.MATH``) in every pass: the fused kernels have no second
    derivative, and another kernel in another pass would differ in its rounding and draw other dropout masks.

    Raises:
        ValueError: a perturbed tensor does not consist of the samples' own rows, or the loss does not depend on it.
        RuntimeError: from torch, where an operation of the model has no second derivative.
    """
    with sdpa_kernel(SDPBackend.MATH):
        return _train(step, proximal)


def _train(step: Step, proximal: BregmanProximal | None) -> StepResult:
    config, weights = step.config, step.weights
    task, live = _run_clean(step)
    parts = [weights.clean * task.loss] if weights.clean > 0 else []
    proximity = gamma = None
    if proximal is not None:
        proximity = step.proximity(task, proximal)
        parts.append(config.proximal * proximity)
    if weights.perturbs:
        gamma, slope = _local_linearity(step, task, live)
        parts.append(weights.linearity * gamma + weights.linearity_gradient * slope)
    if config.telemetry:
        distance = {} if proximity is None else {"proximal": proximity}
        step.telemetry.add(**distance)
    return StepResult(
        loss=sum(parts[1:], parts[0]),
        task_loss=task.loss,
        outputs=task.outputs,
        proximal=proximity,
        linearity=gamma,
    )


def _run_clean(step: Step) -> tuple[TaskPass, list[Tensor]]:
    """The task at the clean point, and the tensors at the sites, part of its graph.

    It runs inside ``DistributedDataParallel``, which waits for one forward and one backward: the final ones.
    """
    live: dict[int, Tensor] = {}

    def watch(index: int, output: Tensor) -> Tensor:
        live[index] = output if output.requires_grad else output.detach().requires_grad_()
        step.perturbation.record(index, output.detach())
        return live[index].clone()  # a model may change what it gets in place

    with torch.enable_grad(), step.hooks.replacing(watch):
        task = step.task(step.inner, step.whole)
    step.hooks.check_calls()
    return step.among_ranks(task), [live[index] for index in range(len(live))]


def _local_linearity(step: Step, task: TaskPass, live: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean gamma, and mean |delta . g|, at the last perturbation."""
    config, perturbation = step.config, step.perturbation
    samples = step.sample_losses
    with torch.enable_grad():
        losses = samples(_logits(task.predictions))
    clean = _expand(step, losses, live)
    start = _ascend(step, samples, clean.detached())

    perturb = partial(perturbation.perturb, telemetry=config.telemetry, keep_delta=step.check_signal)
    losses, points = _losses_at(step, samples, step.model, perturb)
    remainder, slope = clean.remainder(losses, points), clean.slope(points)
    gamma = samples.mean(remainder.abs())
    if config.telemetry:
        climbed = {} if start is None else {"start": start, "end": gamma}
        step.telemetry.add(linearity=gamma, **climbed, **perturbation.figures())
    if step.check_signal:
        with torch.no_grad():
            at_half = clean.remainder(*_losses_at(step, samples, step.inner, perturbation.halved))
        step.telemetry.add(signal_full=gamma, signal_half=samples.mean(at_half.abs()))
    return gamma, samples.mean(slope.abs())


def _expand(step: Step, losses: Tensor, live: list[Tensor]) -> Expansion:
    for name, embeds in zip(step.hooks.names, live, strict=True):
        if embeds.shape[0] % losses.shape[0]:
            raise ValueError(
                f"modules: expected the same number of rows for each of {losses.shape[0]} samples at {name}, whose "
                f"losses are expanded apart, got shape {tuple(embeds.shape)}"
            )
    gradients = step.gradients(losses, live, create_graph=torch.is_grad_enabled())
    return Expansion(losses, [embeds.detach() for embeds in live], gradients)


def _ascend(step: Step, samples: SampleLosses, clean: Expansion) -> Tensor | None:
    """Climb gamma; its mean at the noise, None where nothing climbs."""
    start = None
    for _ in range(step.config.steps):
        leaves = step.leaves()
        with torch.enable_grad():
            losses, points = _losses_at(step, samples, step.inner, lambda index, _, leaves=leaves: leaves[index])
        remainder = clean.remainder(losses.detach(), points)
        sign = remainder.sign()
        pairs = zip(step.gradients(losses, leaves, sign), clean.gradients, strict=True)
        step.perturbation.climb(
            [grad - clean.over_rows(sign, index) * fixed for index, (grad, fixed) in enumerate(pairs)]
        )
        start = samples.mean(remainder.abs()) if start is None else start
    return start


def _losses_at(
    step: Step, samples: SampleLosses, model: torch.nn.Module, point: Replace
) -> tuple[Tensor, list[Tensor]]:
    """(B,) losses with ``point(index, tensor)`` at the sites, and the tensors there."""
    points: dict[int, Tensor] = {}

    def replace(index: int, output: Tensor) -> Tensor:
        points[index] = point(index, output)
        return points[index].clone()  # a model may change what it gets in place

    predictions = step.predict(model, replace)
    return samples(_logits(predictions)), [points[index] for index in range(len(points))]


def _logits(predictions: list[Prediction]) -> list[Tensor]:
    return [prediction.values for prediction in predictions]
