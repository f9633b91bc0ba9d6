"""How the passes over one batch are run and read: through the model's logits, or the hidden states of a linear head."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from alum_kernels.adversarial.heads import IGNORED_LABEL, TOKEN_HEADS, Head
from alum_kernels.adversarial.linear_head import Captured, LinearHead
from alum_kernels.adversarial.predictions import Prediction


class LogitPasses:
    """Passes whose predictions are the logits that the model returns."""

    def __init__(self, head: Head, batch: Mapping[str, Any], positions: str) -> None:
        self._parts = [(part, part.row_mask(batch, positions)) for part in head.parts]

    def run(self, forward: Callable[[], Any]) -> tuple[Any, list[Prediction]]:
        """What ``forward()`` returns, and its predictions."""
        outputs = forward()
        return outputs, self.read(outputs)

    def read(self, outputs: Any) -> list[Prediction]:
        return [Prediction(part, part.logits(outputs), mask) for part, mask in self._parts]


class LinearPasses:
    """Passes whose token predictions are the hidden states of the compared rows, gathered before any product.

    Finding the rows takes their number from the device once a batch.
    """

    def __init__(self, head: Head, batch: Mapping[str, Any], positions: str, linear: LinearHead) -> None:
        self.linear = linear
        self._parts, self._batch = head.parts, batch
        (tokens,) = (part for part in head.parts if part.name in TOKEN_HEADS)
        labels = tokens.labels(batch).flatten()
        self._labelled = (labels != IGNORED_LABEL).nonzero().squeeze(1)
        self._labels = labels.index_select(0, self._labelled)
        self._rows: Tensor | None = self._labelled
        if positions == "all":
            mask = tokens.row_mask(batch, positions)
            self._rows = None if mask is None else mask.flatten().nonzero().squeeze(1)

    def run(self, forward: Callable[[], Any]) -> tuple[Any, list[Prediction]]:
        """What ``forward()`` returns, and its predictions.

        Raises:
            RuntimeError: the projection did not run exactly once.
        """
        outputs, captured = self.capture(forward)
        return outputs, self.read(outputs, captured)

    def capture(self, forward: Callable[[], Any]) -> tuple[Any, Captured]:
        with self.linear.capturing() as captured:
            outputs = forward()
        return outputs, captured

    def read(self, outputs: Any, captured: Captured) -> list[Prediction]:
        if len(captured.hidden) != 1:
            raise RuntimeError(
                f"model: expected its output projection to run once in a forward pass, ran {len(captured.hidden)} times"
            )
        return [
            Prediction(part, self._gathered(captured, self._rows), linear=self.linear, captured=captured)
            if part.name in TOKEN_HEADS
            else Prediction(part, part.logits(outputs), part.row_mask(self._batch))
            for part in self._parts
        ]

    def token_logits(self, outputs: Any) -> Tensor:
        """The few logits that the model still formed."""
        (tokens,) = (part for part in self._parts if part.name in TOKEN_HEADS)
        return tokens.logits(outputs)

    def task_loss(self, outputs: Any, captured: Captured) -> Tensor:
        """Mean cross-entropy of the labelled positions, as the model computes it from labels; zero where there is none.

        Raises:
            ValueError: BERT's pre-training heads without ``next_sentence_label``.
        """
        with self.linear.autocast(captured):
            total = self.linear.cross_entropy(self._gathered(captured, self._labelled), self._labels)
        loss = total / max(self._labels.shape[0], 1)
        for part in self._parts:
            if part.name not in TOKEN_HEADS:
                labels = self._batch.get("next_sentence_label")
                if not isinstance(labels, Tensor):
                    raise ValueError(
                        "batch: expected 'next_sentence_label' (B,) beside 'labels' for a pretraining head"
                    )
                logits = part.logits(outputs)
                wide = torch.promote_types(logits.dtype, torch.float32)
                loss = loss + functional.cross_entropy(logits.to(wide), labels.flatten())
        return loss

    @staticmethod
    def _gathered(captured: Captured, rows: Tensor | None) -> Tensor:
        flat = captured.hidden[0].flatten(0, -2)
        return flat if rows is None else flat.index_select(0, rows)


Passes = LogitPasses | LinearPasses


def without_logits(outputs: Any, head: Head) -> Any:
    """The outputs of a pass whose few logits are nobody's: the fields are emptied."""
    for part in head.parts:
        if part.name in TOKEN_HEADS and isinstance(outputs, Mapping):
            outputs[part.field] = None
        elif part.name in TOKEN_HEADS:
            setattr(outputs, part.field, None)
    return outputs
