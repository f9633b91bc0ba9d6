"""What a model still gets right when its embeddings are attacked, on the labels: projected gradient descent."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alum_kernels.evaluation.attack import CONSTANT, Attack, Subject, attacking
from alum_kernels.evaluation.scoring import CLASS_HEADS, WHOLE_SAMPLE_HEADS, Judge
from alum_kernels.evaluation.search import Radius, Search
from alum_kernels.ops.projected_ascent import LEVELS


@dataclass(frozen=True)
class RobustnessReport:
    """What :func:`accuracy_under_attack` measured.

    Attributes:
        clean_accuracy: share of the rows that the model gets right.
        attacked_accuracy: share of the rows that it gets right at the clean point and at every point of the attack.
        clean_loss: mean cross-entropy of the rows.
        attacked_loss: the same at the last attacked point, of each row the largest over the restarts.
        delta_rms: root mean square of an element of the last perturbations, over unmasked positions.
        rows: number of rows, which are samples, or labelled positions of a head that predicts at each position.
    """

    clean_accuracy: float
    attacked_accuracy: float
    clean_loss: float
    attacked_loss: float
    delta_rms: float
    rows: int


def accuracy_under_attack(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    epsilon: Radius,
    steps: int = 3,
    step_size: float | None = Search.step_size,
    norm: str = "linf",
    level: str = "token",
    restarts: int = Search.restarts,
    seed: int = Search.seed,
    modules: Sequence[str] = Search.modules,
    head: str | None = Search.head,
    backend: str | None = Search.backend,
) -> RobustnessReport:
    """Accuracy and loss of a model that predicts classes, clean and under an attack on its embeddings.

    The model runs in evaluation mode and gets every submodule's own mode back. No parameter's gradient is computed or
    touched. The result is a function of the model, the samples in their order and ``seed``: how the samples are cut
    into batches changes nothing but rounding.

    Args:
        model: a module called as ``model(**batch)``; ``DistributedDataParallel`` around it is seen through.
        batches: arguments of the model, each with the labels of its head, where -100 marks what is not counted; an
            ``attention_mask`` (B, S) says which positions stay as they are. Tensors are moved to the model's device.
        epsilon: radius of the ball, in units of the embeddings: a number; a tensor (N,) with one radius for each
            sample of all batches in order; or a function of a batch that returns (B,), for radii that follow from it.
        steps: gradient steps K; the attack costs 1 + R (K + 1) forward and R K backward passes a batch. 0 leaves the
            noise.
        step_size: length of a step; None is 2.5 epsilon / K, so that K steps can cross the ball.
        norm: ``"linf"`` bounds each element by epsilon, ``"l2"`` the Euclidean norm of a group.
        level: the group of the l2 ball: ``"token"``, ``"sequence"`` or ``"batch"`` (which then depends on how samples
            are batched). Each choice of a multiple-choice sample is a sequence.
        restarts: attacks R from different random starts; a row must be right under all of them.
        seed: of the random starts.
        modules: names of the perturbed modules; empty means the input embeddings, as in :class:`AdversarialConfig`.
        head: one of ``CLASS_HEADS``; None recognises it from the model's class. A row is a sample; of a token,
            masked, causal or sequence-to-sequence head a labelled position. The answer to a question is right if both
            its ends are.
        backend: of the ops; None picks the fastest that can serve.

    Raises:
        ValueError: an argument out of range, a head without classes, a batch without labels, or nothing to count.
        RuntimeError: a perturbed module did not run exactly once in a forward pass.

    Source: Madry et al., arXiv:1706.06083, section 2.1, in the embedding space of Miyato et al., arXiv:1605.07725.

    Example:
        >>> import torch
        >>> from alum_kernels.evaluation.robustness import accuracy_under_attack
        >>> class Classifier(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = torch.nn.Embedding.from_pretrained(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
        ...         self.bias = torch.nn.Parameter(torch.zeros(2))
        ...     def forward(self, input_ids):
        ...         return self.embed(input_ids).mean(1) + self.bias
        >>> batch = {"input_ids": torch.tensor([[0, 0], [1, 0]]), "labels": torch.tensor([1, 0])}
        >>> report = accuracy_under_attack(
        ...     Classifier(), [batch], epsilon=0.1, modules=("embed",), head="classification"
        ... )
        >>> report.clean_accuracy, report.attacked_accuracy
        (1.0, 0.5)
    """
    search = Search(steps, step_size, norm, level, restarts, seed, modules, head, backend)
    with attacking(model, search, heads=CLASS_HEADS, levels=LEVELS, schedule=CONSTANT) as attack:
        sums = [_attacked(attack, *subject) for subject in attack.subjects(batches, epsilon)]
    totals = _Totals(*torch.stack([torch.stack(one) for one in sums]).sum(0).tolist())
    if totals.rows == 0:
        raise ValueError("batches: expected at least one labelled row, got none")
    return RobustnessReport(
        clean_accuracy=totals.correct / totals.rows,
        attacked_accuracy=totals.robust / totals.rows,
        clean_loss=totals.clean_loss / totals.rows,
        attacked_loss=totals.attacked_loss / totals.rows,
        delta_rms=math.sqrt(totals.delta_squared / max(totals.elements, 1)),
        rows=int(totals.rows),
    )


class _Totals(NamedTuple):
    """Sums over the rows of a batch, and over the elements of its perturbations: 0-d fp64 tensors, or numbers."""

    rows: Any
    correct: Any
    robust: Any
    clean_loss: Any
    attacked_loss: Any
    delta_squared: Any
    elements: Any


def _attacked(attack: Attack, subject: Subject, epsilon: float | Tensor) -> _Totals:
    judge = Judge(attack.head, subject.batch, subject.logits)
    whole = attack.head.name in WHOLE_SAMPLE_HEADS

    def right(logits: Sequence[Tensor]) -> Tensor:
        found = judge.right(logits)
        return judge.rows.all_by_sample(found) if whole else found

    def lost(losses: Tensor) -> Tensor:
        return judge.rows.by_sample(losses) if whole else losses

    correct = right(subject.logits)
    clean_loss = lost(judge.losses(subject.logits))
    robust, attacked_loss = correct, torch.full_like(clean_loss, -math.inf)
    delta_squared = torch.zeros((), dtype=torch.float64, device=correct.device)
    for restart in range(attack.search.restarts):
        for point in subject.climb(judge.losses, epsilon, subject.uniform_start(epsilon, restart)):
            robust = robust & right(point.logits)
        attacked_loss = torch.maximum(attacked_loss, lost(point.values))
        for delta in point.deltas:
            delta_squared += delta.double().square().sum()
    totals = _Totals(
        rows=judge.rows.counted.sum() if whole else torch.tensor(correct.numel(), device=correct.device),
        correct=correct.sum(),
        robust=robust.sum(),
        clean_loss=clean_loss.double().sum(),
        attacked_loss=attacked_loss.double().sum(),
        delta_squared=delta_squared,
        elements=subject.elements() * attack.search.restarts,
    )
    return _Totals(*(value.double() for value in totals))
