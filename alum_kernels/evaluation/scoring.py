"""How predictions are judged: which rows count, whose sample they are, what they lose and whether they are right.

    loss of a sample = sum over the head's parts of  w mean over the sample's counted rows of the row's loss

w is 1, and 1/2 for the start and the end of an answer, as in the models' own task loss. A row is a sample for sequence
classification, multiple choice and regression, a labelled position for heads that predict at each position.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alum_kernels.adversarial.heads import HEADS, Head
from alum_kernels.adversarial.labels import IGNORED_LABEL
from alum_kernels.adversarial.row_losses import fitted, part_weight, row_losses, targets_of

CLASS_HEADS = tuple(head for head in HEADS if head not in ("regression", "pretraining"))
"""Heads whose rows are right or wrong, all in one way."""

WHOLE_SAMPLE_HEADS = ("question_answering",)
"""Heads whose parts answer one question: a sample is right if every part is, and counts once."""


class Rows:
    """The rows of a head's predictions that count, flattened over its parts, and the sample of each.

    Args:
        head: the head; its parts are predicted one by one.
        kept: of each part, (B,) or (B, S) bool: the rows that count.
    """

    def __init__(self, head: Head, kept: Sequence[Tensor]) -> None:
        self.samples = kept[0].shape[0]
        self._kept = kept
        weight = part_weight(head)
        places, weights = [], []
        for rows in kept:
            if rows.shape[0] != self.samples:
                raise ValueError(f"labels: expected {self.samples} samples in every part, got {rows.shape[0]}")
            flat = rows.reshape(self.samples, -1)
            index = torch.arange(self.samples, device=rows.device).unsqueeze(1).expand_as(flat)[flat]
            places.append(index)
            weights.append(weight / flat.sum(1)[index].double())
        self.of_sample = torch.cat(places)
        self._weights = torch.cat(weights)

    @property
    def counted(self) -> Tensor:
        """(B,) bool: samples with a row that counts."""
        counts = torch.zeros(self.samples, dtype=torch.long, device=self.of_sample.device)
        return counts.index_add(0, self.of_sample, torch.ones_like(self.of_sample)) > 0

    def gathered(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Of each part's (B, ..., V) or (B, ...) values, those of the rows that count: (n, V) or (n,)."""
        return [value[rows] for value, rows in zip(values, self._kept, strict=True)]

    def by_sample(self, values: Tensor) -> Tensor:
        """(B,) value of each sample from (U,) values of rows, 0 where no row counts."""
        weighted = values * self._weights.to(values.dtype)
        return weighted.new_zeros(self.samples).index_add(0, self.of_sample, weighted)

    def all_by_sample(self, flags: Tensor) -> Tensor:
        """(B,) bool: samples with a row that counts, of which every one is flagged."""
        missed = torch.zeros(self.samples, dtype=torch.long, device=flags.device)
        return self.counted & (missed.index_add(0, self.of_sample, (~flags).long()) == 0)


class Judge:
    """The labels of one batch, and what predictions lose against them.

    Args:
        head: the head.
        batch: arguments of the model, with labels.
        logits: of each part of the head, the predictions: their shapes are what the labels must fit.

    Raises:
        ValueError, TypeError: a batch without labels, or labels of the wrong shape or type.
    """

    def __init__(self, head: Head, batch: Mapping[str, Any], logits: Sequence[Tensor]) -> None:
        self._parts, self._regression = head.parts, head.name == "regression"
        fits = [fitted(part, targets_of(part, batch), values) for part, values in zip(self._parts, logits, strict=True)]
        whole = [torch.ones(values.shape[:1], dtype=torch.bool, device=values.device) for values in logits]
        self.rows = Rows(head, whole if self._regression else [one != IGNORED_LABEL for one in fits])
        self._targets = self.rows.gathered(fits)

    def losses(self, logits: Sequence[Tensor]) -> Tensor:
        """(U,) cross-entropy or mean squared error of each row that counts, fp32 (fp64 for fp64); differentiable."""
        parts = zip(self._parts, self.rows.gathered(logits), self._targets, strict=True)
        return torch.cat([row_losses(*part) for part in parts])

    def right(self, logits: Sequence[Tensor]) -> Tensor:
        """(U,) bool: rows whose largest logit is that of the label; every row of a regression. NaN is not right."""
        gathered = self.rows.gathered(logits)
        if self._regression:
            return torch.ones(gathered[0].shape[0], dtype=torch.bool, device=gathered[0].device)
        pairs = zip(gathered, self._targets, strict=True)
        # argmax takes a NaN for the largest, and the first of many for class 0
        return torch.cat([(rows.argmax(-1) == labels) & ~rows.isnan().any(-1) for rows, labels in pairs])
