"""How far a sample's loss can be raised inside a ball around its embeddings: equation 5 of FreeLB.

    Delta L_max(x, epsilon) = max over ||delta|| <= epsilon of L(x + delta, y)  -  L(x, y)

The maximum is over the clean point and every point of a many-step ascent from every random start, so it is a lower
bound of the true one, and never negative.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alum_kernels.evaluation.attack import Attack, Subject, attacking
from alum_kernels.evaluation.flipping_radius import smallest_flipping_radius
from alum_kernels.evaluation.quartiles import Quartiles
from alum_kernels.evaluation.scoring import Judge
from alum_kernels.evaluation.search import Radius, Search

RESTARTS = 3
"""Starts of a search for the largest loss, unless told otherwise."""


@dataclass(frozen=True, eq=False)
class LossIncrease:
    """What :func:`largest_loss_increase` measured: tensors (N,) on the CPU, one entry a sample in their order.

    Attributes:
        clean_loss, largest_loss: loss of the sample, at the clean point and the largest that was found; fp64. The mean
            cross-entropy of its rows (added over the two heads of pre-training), or its mean squared error.
        correct: bool: every row of the sample is right at the clean point. True for a regression.
        counted: bool: the sample has a row that counts. One that has none has zero losses and enters no quartile.
        epsilon: radius of the sample's ball, fp64.
    """

    clean_loss: Tensor
    largest_loss: Tensor
    correct: Tensor
    counted: Tensor
    epsilon: Tensor

    @property
    def increase(self) -> Tensor:
        """(N,) Delta L_max of each sample, never negative."""
        return self.largest_loss - self.clean_loss

    def quartiles(self, *, only_correct: bool = True) -> Quartiles:
        """Of the increase, over the samples that the model gets right, or over all that count.

        Args:
            only_correct: False takes also those that it gets wrong.

        Raises:
            ValueError: there is no such sample.
        """
        chosen = self.counted & self.correct if only_correct else self.counted
        if not bool(chosen.any()):
            raise ValueError(f"only_correct: no sample to take quartiles of with only_correct={only_correct}")
        return Quartiles.of(self.increase[chosen])


@dataclass(frozen=True, eq=False)
class LossIncreaseComparison:
    """What :func:`compare_loss_increase` measured.

    Attributes:
        reports: of each model by name, in the order given.
        shared: (N,) bool: the samples that are compared.
    """

    reports: Mapping[str, LossIncrease]
    shared: Tensor

    @property
    def samples(self) -> int:
        """Number of samples that are compared."""
        return int(self.shared.sum())

    def increases(self, name: str) -> Tensor:
        """(samples,) increase of the loss at the compared samples, of the model called ``name``."""
        return self.reports[name].increase[self.shared]

    def quartiles(self, name: str) -> Quartiles:
        """Of the increases at the compared samples, of the model called ``name``."""
        return Quartiles.of(self.increases(name))


def largest_loss_increase(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    epsilon: Radius,
    steps: int = Search.steps,
    step_size: float | None = Search.step_size,
    norm: str = Search.norm,
    level: str = Search.level,
    restarts: int = RESTARTS,
    seed: int = Search.seed,
    modules: Sequence[str] = Search.modules,
    head: str | None = Search.head,
    backend: str | None = Search.backend,
) -> LossIncrease:
    """The largest increase of each sample's loss that a search of the ball around its embeddings finds.

    The model runs in evaluation mode and gets every submodule's own mode back; no parameter's gradient is touched; how
    the samples are cut into batches changes nothing but rounding.

    Args:
        model, batches, norm, seed, modules, backend: as in :func:`accuracy_under_attack`.
        epsilon: radius of the ball, in units of the embeddings: a number; a tensor (N,) with one radius for each
            sample of all batches in order, such as :func:`smallest_flipping_radius` finds; or a function of a batch
            that returns (B,).
        steps: gradient steps K of an ascent; a batch costs 1 + R (K + 1) forward and R K backward passes.
        step_size: length of a step; None falls from 2 epsilon to 2 epsilon / K.
        level: the group of the l2 ball, ``"token"`` or ``"sequence"``.
        restarts: ascents R from different random starts.
        head: any head; None recognises it from the model's class.

    Raises:
        ValueError: an argument out of range, a batch without labels, or no sample.
        RuntimeError: a perturbed module did not run exactly once in a forward pass.

    Source: Zhu et al., arXiv:1909.11764, equation 5. Their script (get_highest_loss.py) takes up to 2000 steps of
    length 5e-3 from one random start in the whole batch's l2 ball at batch size 1, stops when the loss has settled, and
    leaves the clean point out of the maximum, which can then be below the clean loss. Here the number of steps is
    fixed, they shrink, they are as long as the radius asks for, and there are several starts.

    Example:
        >>> import torch
        >>> from alum_kernels.evaluation.loss_increase import largest_loss_increase
        >>> class Regressor(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = torch.nn.Embedding.from_pretrained(torch.tensor([[3.0, 4.0]]))
        ...         self.scale = torch.nn.Parameter(torch.ones(()))
        ...     def forward(self, input_ids):
        ...         return self.embed(input_ids).sum((1, 2))[:, None] * self.scale
        >>> batch = {"input_ids": torch.tensor([[0]]), "labels": torch.tensor([7.0])}
        >>> report = largest_loss_increase(Regressor(), [batch], epsilon=2.0, modules=("embed",), head="regression")
        >>> report.clean_loss.tolist(), round(report.increase.item(), 3)  # (sqrt(2) 2)^2
        ([0.0], 8.0)
    """
    search = Search(steps, step_size, norm, level, restarts, seed, modules, head, backend)
    with attacking(model, search) as attack:
        measured = [_of_batch(attack, *subject) for subject in attack.subjects(batches, epsilon)]
    return LossIncrease(*(torch.cat(column) for column in zip(*measured, strict=True)))


def _of_batch(attack: Attack, subject: Subject, epsilon: float | Tensor) -> tuple[Tensor, ...]:
    """The report's columns for one batch."""
    judge = Judge(attack.head, subject.batch, subject.logits)

    def lost(logits: Sequence[Tensor]) -> Tensor:
        return judge.rows.by_sample(judge.losses(logits))

    clean = lost(subject.logits)
    largest = clean
    for restart in range(attack.search.restarts):
        for point in subject.climb(lost, epsilon, subject.uniform_start(epsilon, restart)):
            largest = torch.fmax(largest, point.values)  # a point where the model gives NaN is no maximum
    radius = torch.as_tensor(epsilon, dtype=torch.float64).cpu().expand(subject.samples)
    correct = judge.rows.all_by_sample(judge.right(subject.logits))
    return clean.double().cpu(), largest.double().cpu(), correct.cpu(), judge.rows.counted.cpu(), radius


def compare_loss_increase(
    models: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]],
    *,
    epsilon: Radius | None = None,
    max_epsilon: float | None = None,
    only_correct: bool = True,
    steps: int = Search.steps,
    step_size: float | None = Search.step_size,
    norm: str = Search.norm,
    level: str = Search.level,
    restarts: int = RESTARTS,
    seed: int = Search.seed,
    modules: Sequence[str] = Search.modules,
    head: str | None = Search.head,
    backend: str | None = Search.backend,
) -> LossIncreaseComparison:
    """The largest loss increase of several models at the samples that all of them get right.

    Args:
        models: models by name; the same batches fit all of them. They may be on different devices.
        batches: as in :func:`accuracy_under_attack`; all are held in memory, for each model sees them.
        epsilon: the radii, the same for every model, as in :func:`largest_loss_increase`. None takes for each sample
            the largest radius that the first model was seen to withstand (:func:`smallest_flipping_radius`), so that
            no sample's ball is trivial or hopeless.
        max_epsilon: of that search, with ``epsilon=None`` only.
        only_correct: compare the samples that every model gets right at the clean point; False compares all, for
            models of language, whose samples have many rows.
        steps, step_size, norm, level, restarts, seed, modules, head, backend: as in :func:`largest_loss_increase`.

    Raises:
        ValueError: no model, ``epsilon`` and ``max_epsilon`` both given or both missing, or no sample left to compare.

    Source: the comparison that Zhu et al., arXiv:1909.11764, make with their equation 5: the median over the samples
    that all compared models get right. Their script finds each sample's radius with the first model too: the first on a
    falling grid of 22 values from 0.2 to 1e-4 at which that model's largest loss is at most ln 2, which for two
    classes is our criterion, that the prediction holds; with more classes ours allows a larger radius.
    """
    if not models:
        raise ValueError("models: expected at least one model, got none")
    if (epsilon is None) == (max_epsilon is None):
        given = "neither" if epsilon is None else "both"
        raise ValueError(f"epsilon, max_epsilon: expected exactly one of them, got {given}")
    held = list(batches)
    options = asdict(Search(steps, step_size, norm, level, restarts, seed, modules, head, backend))
    if epsilon is None:
        found = smallest_flipping_radius(next(iter(models.values())), held, max_epsilon=max_epsilon, **options)
        epsilon = found.withstood
    return compare_reports(
        {name: largest_loss_increase(model, held, epsilon=epsilon, **options) for name, model in models.items()},
        only_correct=only_correct,
    )


def compare_reports(reports: Mapping[str, LossIncrease], *, only_correct: bool = True) -> LossIncreaseComparison:
    """The comparison of models that were measured one by one, on the same samples with the same radii.

    Args:
        reports: of each model by name.
        only_correct: as in :func:`compare_loss_increase`.

    Raises:
        ValueError: no report, reports of different samples or radii, or no sample left to compare.
    """
    if not reports:
        raise ValueError("reports: expected at least one report, got none")
    first, *others = reports.values()
    if any(not torch.equal(other.epsilon, first.epsilon) for other in others):
        raise ValueError("reports: expected the same samples with the same radii in every report")
    shared = torch.stack([report.counted for report in reports.values()]).all(0)
    if only_correct:
        shared = shared & torch.stack([report.correct for report in reports.values()]).all(0)
    if not bool(shared.any()):
        why = "that every model gets right" if only_correct else "with labels"
        raise ValueError(f"reports: expected at least one sample {why}, got none of {shared.numel()}")
    return LossIncreaseComparison(reports, shared)
