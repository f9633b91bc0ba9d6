"""The task's loss of each sample of a batch, from logits and labels, without stopping the device.

classification, multiple choice      cross-entropy of the sample's label
a class or token at each position    mean cross-entropy of the sample's labelled positions
question answering                   mean of the cross-entropies of the answer's start and end, padding left out
BERT's pre-training                  sum of both heads'
regression                           squared error, the mean over the predicted numbers
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alum_kernels.adversarial.heads import Head
from alum_kernels.adversarial.labels import IGNORED_LABEL
from alum_kernels.adversarial.row_losses import counts_of, fitted, part_weight, row_losses, targets_of, weighted_mean


class SampleLosses:
    """What the B samples of one batch lose, given what is predicted for them.

    Args:
        head: the model's.
        batch: arguments of the model, labels included.
        weight: 0-d factor of means, of a rank among others; None for 1.

    Raises:
        ValueError: the batch lacks the head's labels.
    """

    def __init__(self, head: Head, batch: Mapping[str, Any], weight: Tensor | None = None) -> None:
        self._parts = head.parts
        self._labels = [targets_of(part, batch) for part in self._parts]
        self._weight, self._of_rank = part_weight(head), weight
        self._counts = None if head.name == "regression" else counts_of(self._labels)

    def __call__(self, logits: Sequence[Tensor]) -> Tensor:
        """(B,) losses, fp32 (fp64 for fp64), 0 for a sample without a label; differentiable twice.

        Args:
            logits: of each part of the head: (B, V), or (B, S, V) where it predicts at each position.

        Raises:
            ValueError: logits and labels do not fit each other.
        """
        parts = zip(self._parts, logits, self._labels, strict=True)
        return self._weight * sum(_of_samples(*part) for part in parts)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of (B,) values over the labels, each sample counting as often as it has one; 0 where none has.

        The mean of the losses is then the task's loss, and micro-batches that are weighted by their labels add up.
        """
        if self._counts is None:
            mean = values.mean()
        else:
            mean = torch.where(self._counts > 0, values * self._counts, 0).sum() / self._counts.sum().clamp(min=1)
        return mean if self._of_rank is None else weighted_mean(mean, self._of_rank)


def _of_samples(part: Head, logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) loss of each row, or mean over the labelled rows of a sample."""
    targets = fitted(part, labels, logits)
    rows = row_losses(part, logits, targets)
    return rows if rows.dim() == 1 else rows.sum(1) / (targets != IGNORED_LABEL).sum(1).clamp(min=1)
