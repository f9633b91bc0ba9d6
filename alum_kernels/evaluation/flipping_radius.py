"""How near to a sample's embeddings its prediction flips: a bisection over radii, for all samples of a batch at once.

    low = max_epsilon 1e-4, high = max_epsilon;  R times: search the ball of radius sqrt(low high) of each sample
    flips at delta:  high <- min(high, ||delta||)          holds:  low <- radius

``high`` is the norm of a perturbation that flips the prediction, so it bounds the true radius from above whatever the
search missed; ``low`` is what the search failed to flip. A flip inside a ball that had held shows that its search
missed something: ``low`` falls back to the largest smaller ball that was searched and held.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alum_kernels.evaluation.attack import Attack, Subject, attacking
from alum_kernels.evaluation.scoring import CLASS_HEADS, Judge
from alum_kernels.evaluation.search import Search
from alum_kernels.ops.checks import check_count, check_magnitude

SMALLEST_SHARE = 1e-4
"""Of ``max_epsilon``: the radius below which no ball is searched."""


@dataclass(frozen=True, eq=False)
class FlippingRadius:
    """What :func:`smallest_flipping_radius` found: tensors (N,) on the CPU, one entry a sample in their order.

    Attributes:
        radius: fp64, norm of the smallest perturbation found that makes a row of the sample wrong; 0 for a sample that
            is wrong already, inf for one that no search flipped.
        withstood: fp64, the largest radius below ``radius`` whose ball was searched in vain; 0 if there is none, as for
            a sample that flips in every ball that was searched.
        counted: bool: the sample has a row that counts. One that has none has radius inf and withstood 0.
    """

    radius: Tensor
    withstood: Tensor
    counted: Tensor


def smallest_flipping_radius(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    max_epsilon: float,
    rounds: int = 10,
    steps: int = Search.steps,
    step_size: float | None = Search.step_size,
    norm: str = Search.norm,
    level: str = Search.level,
    restarts: int = Search.restarts,
    seed: int = Search.seed,
    modules: Sequence[str] = Search.modules,
    head: str | None = Search.head,
    backend: str | None = Search.backend,
) -> FlippingRadius:
    """The smallest radius at which each sample's prediction flips.

    The model runs in evaluation mode and gets every submodule's own mode back; no parameter's gradient is touched; how
    the samples are cut into batches changes nothing but rounding.

    Args:
        model, batches, norm, seed, modules, backend: as in :func:`accuracy_under_attack`.
        max_epsilon: largest radius that is searched, in units of the embeddings, above 0.
        rounds: bisections R after the search of the whole ball; they leave ``radius`` within a factor
            1e4^(1 / 2^R) of ``withstood`` (1.01 for 10) where a flip is found and no search contradicts another. A
            batch costs (R + 1) restarts (steps + 1) forward passes.
        steps, step_size: of each search, as in :func:`largest_loss_increase`.
        level: the group of the l2 ball, ``"token"`` or ``"sequence"``.
        restarts: searches of a ball from different random starts.
        head: a head with classes; None recognises it from the model's class. A sample with many rows (positions, or a
            start and an end) flips when one of them is wrong.

    Raises:
        ValueError: an argument out of range, a head without classes, a batch without labels, or no sample.
        RuntimeError: a perturbed module did not run exactly once in a forward pass.

    Source: the per-sample radius of Zhu et al., arXiv:1909.11764 (their script's grid of radii, see
    :func:`compare_loss_increase`), by bisection.

    Example:
        >>> import torch
        >>> from alum_kernels.evaluation.flipping_radius import smallest_flipping_radius
        >>> class Classifier(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = torch.nn.Embedding.from_pretrained(torch.tensor([[2.0, 1.0]]))
        ...         self.bias = torch.nn.Parameter(torch.zeros(2))
        ...     def forward(self, input_ids):
        ...         return self.embed(input_ids).mean(1) + self.bias
        >>> batch = {"input_ids": torch.tensor([[0]]), "labels": torch.tensor([0])}
        >>> found = smallest_flipping_radius(
        ...     Classifier(), [batch], max_epsilon=3.0, modules=("embed",), head="classification"
        ... )
        >>> round(found.radius.item(), 2)  # 1 / sqrt(2)
        0.71
    """
    if check_magnitude("max_epsilon", max_epsilon) == 0:
        raise ValueError("max_epsilon: expected a number > 0, got 0")
    check_count("rounds", rounds, 0)
    search = Search(steps, step_size, norm, level, restarts, seed, modules, head, backend)
    with attacking(model, search, heads=CLASS_HEADS) as attack:
        subjects = attack.subjects(batches, max_epsilon)
        found = [_of_batch(attack, subject, max_epsilon, rounds) for subject, _ in subjects]
    return FlippingRadius(*(torch.cat(column) for column in zip(*found, strict=True)))


def _of_batch(attack: Attack, subject: Subject, max_epsilon: float, rounds: int) -> tuple[Tensor, ...]:
    """The report's columns for one batch."""
    judge = Judge(attack.head, subject.batch, subject.logits)
    right = judge.rows.all_by_sample(judge.right(subject.logits))
    radius, withstood = _bisected(
        lambda tried: _nearest_flip(attack, subject, judge, tried), right, max_epsilon, rounds
    )
    radius = torch.where(judge.rows.counted, radius, torch.inf)
    return radius.cpu(), withstood.cpu(), judge.rows.counted.cpu()


def _bisected(
    nearest_flip: Callable[[Tensor], Tensor], right: Tensor, max_epsilon: float, rounds: int
) -> tuple[Tensor, Tensor]:
    """(B,) fp64 radius and withstood of each sample.

    Args:
        nearest_flip: of (B,) radii, to the norm of the smallest perturbation found in each sample's ball at which it is
            wrong, at most its radius; inf where the ball holds.
        right: (B,) bool: samples that are right at the clean point; the others have radius and withstood 0.
        max_epsilon, rounds: as in :func:`smallest_flipping_radius`.
    """
    tried = torch.full(right.shape, max_epsilon, dtype=torch.float64, device=right.device)
    floor = tried * SMALLEST_SHARE
    radius, held = torch.full_like(tried, torch.inf), []
    for _ in range(rounds + 1):
        nearest = nearest_flip(tried)
        radius = torch.minimum(radius, nearest)
        held.append(torch.where(nearest < torch.inf, 0.0, tried))
        balls = torch.stack(held)
        withstood = torch.where(balls < radius, balls, 0.0).amax(0)
        if not bool(((radius < torch.inf) & right).any()):  # nothing to bisect
            break
        high = radius.clamp(max=max_epsilon)
        tried = torch.sqrt(torch.minimum(torch.maximum(withstood, floor), high) * high)
    return torch.where(right, radius, 0.0), torch.where(right, withstood, 0.0)


def _nearest_flip(attack: Attack, subject: Subject, judge: Judge, radius: Tensor) -> Tensor:
    """(B,) norm of the smallest perturbation seen in each sample's ball at which it is wrong, inf if there is none."""
    epsilon = radius.float()
    nearest = torch.full_like(radius, torch.inf)
    for restart in range(attack.search.restarts):
        for point in subject.climb(judge.losses, epsilon, subject.uniform_start(epsilon, restart)):
            wrong = judge.rows.counted & ~judge.rows.all_by_sample(judge.right(point.logits))
            norms = torch.minimum(subject.delta_norms(point.deltas), radius)  # which rounding may overstep
            nearest = torch.where(wrong, torch.minimum(nearest, norms), nearest)
    return nearest
