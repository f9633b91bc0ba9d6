"""How much a model's predictions move inside a ball around its embeddings, with no regard to labels.

    D(delta) = symmetric KL of the predictions at x + delta and at x        (squared error for a regression)

at a random delta of the ball, and at the largest D of an ascent on D itself that starts there. A model whose
predictions an adversary moves as little as chance does has a ratio near 1.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alum_kernels.adversarial.heads import POSITIONS
from alum_kernels.evaluation.attack import Attack, Subject, attacking
from alum_kernels.evaluation.scoring import Rows
from alum_kernels.evaluation.search import Radius, Search
from alum_kernels.ops.checks import check_choice, check_count


@dataclass(frozen=True, eq=False)
class SmoothnessReport:
    """What :func:`local_smoothness` measured: tensors (N,) on the CPU, one entry a sample in their order.

    Attributes:
        random: fp64, divergence at a random perturbation, the mean over the draws.
        ascended: fp64, the largest divergence found by the ascents from those perturbations.
        counted: bool: the sample has a row that is compared. One that has none has zeros and enters no figure.
    """

    random: Tensor
    ascended: Tensor
    counted: Tensor

    @property
    def random_mean(self) -> float:
        """Mean over the samples of the divergence at a random perturbation."""
        return self.random[self.counted].mean().item()

    @property
    def random_median(self) -> float:
        """Its median over the samples."""
        return self.random[self.counted].quantile(0.5).item()

    @property
    def ascended_mean(self) -> float:
        """Mean over the samples of the largest divergence that was found."""
        return self.ascended[self.counted].mean().item()

    @property
    def ascended_median(self) -> float:
        """Its median over the samples."""
        return self.ascended[self.counted].quantile(0.5).item()

    @property
    def ratio(self) -> float:
        """Mean ascended over mean random divergence, at least 1; NaN where nothing moved."""
        return self.ascended_mean / self.random_mean if self.random_mean > 0 else float("nan")

    @property
    def median_ratio(self) -> float:
        """Median over the samples of ascended over random divergence, those left out that chance did not move."""
        moved = self.counted & (self.random > 0)
        return (self.ascended[moved] / self.random[moved]).quantile(0.5).item() if bool(moved.any()) else float("nan")


def local_smoothness(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    epsilon: Radius,
    steps: int = 10,
    step_size: float | None = Search.step_size,
    norm: str = Search.norm,
    level: str = Search.level,
    draws: int = Search.restarts,
    positions: str = "labelled",
    seed: int = Search.seed,
    modules: Sequence[str] = Search.modules,
    head: str | None = Search.head,
    backend: str | None = Search.backend,
) -> SmoothnessReport:
    """Divergence between clean and perturbed predictions, at random and at ascended perturbations.

    The model runs in evaluation mode and gets every submodule's own mode back; no parameter's gradient is touched; how
    the samples are cut into batches changes nothing but rounding.

    Args:
        model, norm, seed, modules, backend: as in :func:`accuracy_under_attack`.
        batches: arguments of the model; labels are needed only to say which positions of a language model are
            compared.
        epsilon: radius of the ball, in units of the embeddings: a number, a tensor (N,) with one radius for each
            sample of all batches in order, or a function of a batch that returns (B,).
        steps: gradient steps K of the ascent; a batch costs 1 + draws (K + 1) forward and draws K backward passes.
        step_size: length of a step; None falls from 2 epsilon to 2 epsilon / K.
        level: the group of the l2 ball, ``"token"`` or ``"sequence"``.
        draws: random perturbations, each with its own ascent. In an l2 ball they have norm epsilon and a random
            direction (nearly all of a ball of many dimensions lies at its surface), so the ratio is the direction's
            worth; in the linf ball they are uniform.
        positions: of a language model, ``"labelled"`` or ``"all"``, as in :class:`AdversarialConfig`.
        head: any head; None recognises it from the model's class. A regression is compared by squared error.

    Raises:
        ValueError: an argument out of range, or no sample to compare.
        RuntimeError: a perturbed module did not run exactly once in a forward pass.

    Source: the smoothness that Jiang et al., arXiv:1911.03437, equation 3, and Liu et al., arXiv:2004.08994,
    regularise: max over ||delta|| <= epsilon of the symmetric KL, here measured. Random perturbations are the control
    of Aghajanyan et al., arXiv:2008.03156.

    Example:
        >>> import torch
        >>> from alum_kernels.evaluation.smoothness import local_smoothness
        >>> class Regressor(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = torch.nn.Embedding.from_pretrained(torch.tensor([[3.0, 4.0]]))
        ...         self.scale = torch.nn.Parameter(torch.ones(()))
        ...     def forward(self, input_ids):
        ...         return self.embed(input_ids).sum((1, 2))[:, None] * self.scale
        >>> batch = {"input_ids": torch.tensor([[0]])}
        >>> report = local_smoothness(Regressor(), [batch], epsilon=2.0, modules=("embed",), head="regression")
        >>> round(report.ascended_mean, 3), report.random_mean < 8.0  # (sqrt(2) 2)^2
        (8.0, True)
    """
    check_count("draws", draws, 1)
    check_choice("positions", positions, POSITIONS)
    search = Search(steps, step_size, norm, level, draws, seed, modules, head, backend)
    with attacking(model, search) as attack:
        measured = [_of_batch(attack, *subject, positions) for subject in attack.subjects(batches, epsilon)]
    report = SmoothnessReport(*(torch.cat(column) for column in zip(*measured, strict=True)))
    if not bool(report.counted.any()):
        raise ValueError("batches: expected at least one row to compare, got none")
    return report


def _of_batch(attack: Attack, subject: Subject, epsilon: float | Tensor, positions: str) -> tuple[Tensor, ...]:
    """The report's columns for one batch."""
    rows = Rows(attack.head, _compared(attack, subject, positions))
    clean = rows.gathered(subject.logits)

    def divergence(logits: Sequence[Tensor]) -> Tensor:
        return rows.by_sample(
            torch.cat(
                [
                    part.divergence(
                        adv,
                        reference,
                        None,
                        divergence="symmetric_kl",
                        gradient="detach_clean",
                        temperature=1.0,
                        reduction="none",
                        backend=attack.search.backend,
                    )
                    for part, adv, reference in zip(attack.head.parts, rows.gathered(logits), clean, strict=True)
                ]
            )
        )

    random = torch.zeros(subject.samples, dtype=torch.float64, device=subject.logits[0].device)
    ascended = torch.zeros_like(random)
    for draw in range(attack.search.restarts):
        points = subject.climb(divergence, epsilon, subject.random_point(epsilon, draw))
        for number, point in enumerate(points):
            if number == 0:
                random += point.values / attack.search.restarts
            ascended = torch.fmax(ascended, point.values.double())
    return random.cpu(), ascended.cpu(), rows.counted.cpu()


def _compared(attack: Attack, subject: Subject, positions: str) -> list[Tensor]:
    """Of each part, which rows are compared."""
    kept = []
    for part, logits in zip(attack.head.parts, subject.logits, strict=True):
        mask = part.row_mask(subject.batch, positions)
        every = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        kept.append(every if mask is None else mask != 0)
    return kept
