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
from torch.nn import functional

from alum_kernels.adversarial.heads import Head
from alum_kernels.adversarial.labels import IGNORED_LABEL


class SampleLosses:
    """What the B samples of one batch lose, given what is predicted for them.

    Args:
        head: the model's.
        batch: arguments of the model, labels included.

    Raises:
        ValueError: the batch lacks the head's labels.
    """

    def __init__(self, head: Head, batch: Mapping[str, Any]) -> None:
        self._regression = head.name == "regression"
        if self._regression:
            labels = batch.get("labels")
            if not isinstance(labels, Tensor):
                listed = ", ".join(batch) or "an empty batch"
                raise ValueError(f"batch: expected 'labels' (B,) for a {head.name} head, got {listed}")
            self._labels = [labels]
        else:
            self._labels = [part.labels(batch) for part in head.parts]
        self._share = 1 / len(self._labels) if head.name == "question_answering" else 1.0

    def __call__(self, logits: Sequence[Tensor]) -> Tensor:
        """(B,) losses, fp32 (fp64 for fp64), 0 for a sample without a label; differentiable twice.

        Args:
            logits: of each part of the head: (B, V), or (B, S, V) where it predicts at each position.

        Raises:
            ValueError: logits and labels do not fit each other.
        """
        wide = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in logits]
        if self._regression:
            return _squared_errors(wide[0], self._labels[0])
        return self._share * sum(_cross_entropies(*pair) for pair in zip(wide, self._labels, strict=True))

    def mean(self, values: Tensor) -> Tensor:
        """The mean of (B,) values over the labels, each sample counting as often as it has one; 0 where none has.

        The mean of the losses is then the task's loss, and micro-batches that are weighted by their labels add up.
        """
        if self._regression:
            return values.mean()
        labels = self._labels[0]
        counts = (labels != IGNORED_LABEL).view(labels.shape[0], -1).sum(1)
        return torch.where(counts > 0, values * counts, 0).sum() / counts.sum().clamp(min=1)


def _cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels: expected shape {tuple(logits.shape[:-1])} as the logits, got {tuple(labels.shape)}")
    rows = functional.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    ).view_as(labels)
    return rows if rows.dim() == 1 else rows.sum(1) / (labels != IGNORED_LABEL).sum(1).clamp(min=1)


def _squared_errors(predicted: Tensor, labels: Tensor) -> Tensor:
    if labels.shape != predicted.shape and (predicted.shape[1] != 1 or labels.shape != predicted.shape[:1]):
        raise ValueError(f"labels: expected shape {tuple(predicted.shape)} as predicted, got {tuple(labels.shape)}")
    return (predicted - labels.reshape(predicted.shape).to(predicted.dtype)).square().mean(1)
