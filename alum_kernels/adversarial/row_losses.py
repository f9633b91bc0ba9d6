"""What one row of a head's predictions loses against its target, and how the parts of a head weigh.

classes        cross-entropy of the row's class
regression     squared error, the mean over the predicted numbers

A row is a sample, or a position of a head that predicts at each position.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from alum_kernels.adversarial.heads import Head
from alum_kernels.adversarial.labels import IGNORED_LABEL


def widened(tensor: Tensor) -> Tensor:
    """fp32, or fp64 where it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def weighted_mean(mean: Tensor, weight: Tensor) -> Tensor:
    """``weight`` times a mean, fp32 (fp64 for fp64); of weight 0 the mean may be 0 / 0, and gets a zero gradient."""
    wide = widened(mean)
    return torch.where(weight > 0, wide, 0) * weight.to(wide.dtype)


def part_weight(head: Head) -> float:
    """Of each part in a sample's loss, as in the models' own: 1/2 for both ends of an answer, else 1."""
    return 1 / len(head.parts) if head.name == "question_answering" else 1.0


def targets_of(part: Head, batch: Mapping[str, Any]) -> Tensor:
    """What one part of a head should predict: class indices (B,) or (B, S), or the numbers of a regression.

    Raises:
        ValueError: the batch lacks the part's labels.
    """
    if part.name != "regression":
        return part.labels(batch)
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        listed = ", ".join(batch) or "an empty batch"
        raise ValueError(f"batch: expected 'labels' (B,) for a {part.name} head, got {listed}")
    return labels


def label_count(head: Head, batch: Mapping[str, Any]) -> Tensor | int:
    """Over how many labels the task's loss is a mean: of a head of several parts, the most that a sample has."""
    targets = [targets_of(part, batch) for part in head.parts]
    return len(targets[0]) if head.name == "regression" else counts_of(targets).sum()


def counts_of(targets: Sequence[Tensor]) -> Tensor:
    """(B,) labels of each sample that count; of several parts, the most."""
    # a batch may be empty, of which -1 would be no size
    flat = [part.reshape(part.shape[0], math.prod(part.shape[1:])) for part in targets]
    return torch.stack([(part != IGNORED_LABEL).sum(1) for part in flat]).amax(0)


def own_targets(part: Head, batch: Mapping[str, Any], length: int) -> tuple[Tensor, int]:
    """Targets of one part of a head as the models' own loss counts them, and the target that it ignores.

    An answer that lies outside of the ``length`` positions counts in none of the two means; one in the padding does.
    """
    if part.name == "question_answering":
        return part.answer_positions(batch).clamp(0, length), length
    return part.labels(batch), IGNORED_LABEL


def label_sum(part: Head, outputs: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Sum of one part's cross-entropies as the models' own loss takes them, and over how many labels."""
    logits = part.logits(outputs)
    targets, ignored = own_targets(part, batch, logits.shape[1])
    flat = logits.flatten(0, -2)
    loss = functional.cross_entropy(flat, targets.flatten(), ignore_index=ignored, reduction="sum")
    return loss, (targets != ignored).sum()


def fitted(part: Head, targets: Tensor, logits: Tensor) -> Tensor:
    """The targets, one a row of the logits; of a regression (B, V) as predicted, also where (B,) numbers came.

    Raises:
        ValueError: they do not fit each other.
    """
    regression = part.name == "regression"
    rows = logits.shape if regression else logits.shape[:-1]
    column = regression and logits.shape[1] == 1 and targets.shape == logits.shape[:1]
    if targets.shape != rows and not column:
        raise ValueError(f"labels: expected shape {tuple(rows)} as the logits, got {tuple(targets.shape)}")
    return targets.reshape(rows)


def row_losses(part: Head, logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each row, fp32 (fp64 for fp64), 0 where no label counts; differentiable twice.

    Args:
        part: one part of a head.
        logits: (..., V) predictions.
        targets: as :func:`fitted` returns them: (...) class indices, or the (..., V) numbers of a regression.
    """
    wide = widened(logits)
    if part.name == "regression":
        return (wide - targets.to(wide.dtype)).square().mean(-1)
    return functional.cross_entropy(
        wide.flatten(0, -2), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    ).view_as(targets)
