"""How the passes over one batch are run and read: through the model's logits, or the hidden states of a linear head."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from alum_kernels.adversarial.heads import Head
from alum_kernels.adversarial.labels import IGNORED_LABEL
from alum_kernels.adversarial.linear_head import Captured, LinearHead, losses_agree
from alum_kernels.adversarial.model_state import dropout_off
from alum_kernels.adversarial.predictions import Prediction


def loss_of(outputs: Any) -> Tensor | None:
    """The loss that a model computed, if it did."""
    return outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)


class LogitPasses:
    """Passes whose predictions are the logits that the model returns."""

    def __init__(self, head: Head, batch: Mapping[str, Any], positions: str) -> None:
        self._batch = batch
        self._parts = [(part, part.row_mask(batch, positions)) for part in head.parts]

    def run(self, forward: Callable[[], Any]) -> list[Prediction]:
        """The predictions of a pass."""
        return self.read(forward())

    def read(self, outputs: Any) -> list[Prediction]:
        """The predictions in what the model returned."""
        return [Prediction(part, part.predictions(outputs, self._batch), mask) for part, mask in self._parts]


class LinearPasses:
    """Passes whose token predictions are the hidden states of the compared rows, gathered before any product.

    Their number, and that of the labels, is read from the device once a batch.
    """

    def __init__(self, head: Head, batch: Mapping[str, Any], positions: str, linear: LinearHead) -> None:
        self._linear, self._head, self._parts, self._tokens, self._batch = linear, head, head.parts, head.tokens, batch
        self._other_labels = {part: part.labels(batch) for part in self._parts if part != self._tokens}
        labels = self._tokens.labels(batch).flatten()
        self._labelled = (labels != IGNORED_LABEL).nonzero().squeeze(1)
        self._labels = labels.index_select(0, self._labelled)
        self._compared: Tensor | None = self._labelled
        if positions == "all":
            mask = self._tokens.row_mask(batch, positions)
            self._compared = None if mask is None else mask.flatten().nonzero().squeeze(1)

    def run(self, forward: Callable[[], Any]) -> list[Prediction]:
        """The predictions of a pass.

        Raises:
            RuntimeError: the projection did not run exactly once.
        """
        outputs, captured = self._capture(forward)
        return self._read(outputs, captured, _gathered(captured, self._compared))

    def run_clean(self, forward: Callable[[], Any]) -> tuple[Tensor, Any, list[Prediction]]:
        """Task loss, outputs without logits, and predictions of the clean pass."""
        outputs, captured = self._capture(forward)
        labelled = _gathered(captured, self._labelled)
        compared = labelled if self._compared is self._labelled else _gathered(captured, self._compared)
        loss = self._task_loss(outputs, captured, labelled)
        predictions = self._read(outputs, captured, compared)
        if isinstance(outputs, Mapping):
            outputs[self._tokens.field] = None
        else:
            setattr(outputs, self._tokens.field, None)
        return loss, outputs, predictions

    def verify(self, model: nn.Module, own: Any) -> str | None:
        """Why the model is not what this takes it for, given what it returned for the batch, or None if it is."""
        with self._linear.capturing() as captured:
            outputs = model(**self._head.inputs(self._batch, model))
        mismatch = self._linear.mismatch(captured, self._tokens.logits(outputs))
        if mismatch is not None:
            return mismatch
        loss = self._task_loss(outputs, captured, _gathered(captured, self._labelled))
        if not losses_agree(loss_of(own), loss, captured):
            return "its loss is not the mean cross-entropy of its labels"
        return None

    def _capture(self, forward: Callable[[], Any]) -> tuple[Any, Captured]:
        with self._linear.capturing() as captured:
            outputs = forward()
        if len(captured.hidden) != 1:
            raise RuntimeError(
                "model: expected its output projection to run once in a forward pass, "
                f"got {len(captured.hidden)} calls; AdversarialConfig(fused_head=False) does not need that"
            )
        return outputs, captured

    def _read(self, outputs: Any, captured: Captured, compared: Tensor) -> list[Prediction]:
        return [
            Prediction(part, compared, linear=self._linear, captured=captured)
            if part == self._tokens
            else Prediction(part, part.predictions(outputs, self._batch), part.row_mask(self._batch))
            for part in self._parts
        ]

    def _task_loss(self, outputs: Any, captured: Captured, labelled: Tensor) -> Tensor:
        """Mean cross-entropy of the labels, zero where there is none; the sum over ``num_items_in_batch`` if given."""
        with self._linear.autocast(captured):
            total = self._linear.cross_entropy(labelled, self._labels)
        items = self._batch.get("num_items_in_batch")
        loss = total / (max(self._labels.shape[0], 1) if items is None else items)
        for part, labels in self._other_labels.items():
            logits = part.logits(outputs)
            wide = torch.promote_types(logits.dtype, torch.float32)
            loss = loss + functional.cross_entropy(logits.to(wide), labels)
        return loss


Passes = LogitPasses | LinearPasses


def _gathered(captured: Captured, rows: Tensor | None) -> Tensor:
    flat = captured.hidden[0].flatten(0, -2)
    return flat if rows is None else flat.index_select(0, rows)


def one_sample(head: Head, batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sample with the most labels as a batch of its own, or None where there is no label."""
    labels = head.tokens.labels(batch)
    counts = (labels != IGNORED_LABEL).sum(1)
    if labels.shape[0] == 0 or int(counts.max()) == 0:
        return None
    index = int(counts.argmax())

    def of_sample(value: Any) -> Any:
        if isinstance(value, Mapping):  # masks, one a kind of layer
            return {key: of_sample(part) for key, part in value.items()}
        return value[index : index + 1] if isinstance(value, Tensor) and value.shape[:1] == labels.shape[:1] else value

    return {key: of_sample(value) for key, value in batch.items() if key != "num_items_in_batch"}


def refusal(model: nn.Module, head: Head, sample: Mapping[str, Any], linear: LinearHead) -> str | None:
    """Why the model cannot be trained through ``linear``, or None: it runs twice on one sample, without dropout."""
    passes = LinearPasses(head, sample, "labelled", linear)
    with torch.no_grad(), dropout_off(model):
        own = model(**sample)
        return "it computes no loss from labels" if loss_of(own) is None else passes.verify(model, own)
