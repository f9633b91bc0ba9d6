"""How the passes over one batch are run and read: through the model's logits, or the hidden states of a linear head."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from alum_kernels.adversarial.heads import Head
from alum_kernels.adversarial.labels import IGNORED_LABEL
from alum_kernels.adversarial.linear_head import Captured, LinearHead, losses_agree
from alum_kernels.adversarial.model_state import dropout_off
from alum_kernels.adversarial.predictions import Prediction
from alum_kernels.adversarial.row_losses import widened
from alum_kernels.adversarial.samples import sample_count, select_samples


def loss_of(outputs: Any) -> Tensor | None:
    """The loss that a model computed, if it did."""
    return outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)


class TaskPass(NamedTuple):
    """One pass that computes the task's loss.

    Attributes:
        loss: the task's.
        outputs: what the model returned.
        predictions: of the samples that are perturbed.
        shares: (heads,) factors of the mean divergences over these samples' rows; None where each is 1.
        part_losses: the mean of each part of the loss, where they were taken one by one.
    """

    loss: Tensor
    outputs: Any
    predictions: list[Prediction]
    shares: Tensor | None = None
    part_losses: Sequence[Tensor] = ()


class LogitPasses:
    """Passes whose predictions are the logits that the model returns."""

    def __init__(self, head: Head, batch: Mapping[str, Any], positions: str) -> None:
        self._batch = batch
        self._parts = [(part, part.row_mask(batch, positions)) for part in head.parts]

    def select(self, predictions: Sequence[Prediction], index: Tensor) -> list[Prediction]:
        """Predictions of a larger batch, for the samples of this one, which are at ``index`` in it."""
        pairs = zip(predictions, self._parts, strict=True)
        return [replace(given, values=given.values.index_select(0, index), mask=mask) for given, (_, mask) in pairs]

    def run(self, forward: Callable[[], Any]) -> list[Prediction]:
        """The predictions of a pass."""
        return self.read(forward())

    def read(self, outputs: Any) -> list[Prediction]:
        """The predictions in what the model returned."""
        return [Prediction(part, part.predictions(outputs, self._batch), mask) for part, mask in self._parts]


class LinearPasses:
    """Passes whose token predictions are the hidden states of the compared rows, gathered before any product.

    Their number, and that of the labels, is read from the device; where there is room for them it is not.

    Args:
        head: what the model predicts.
        batch: arguments of the model, labels included.
        positions: ``"labelled"`` or ``"all"`` are compared.
        linear: the output projection.
        room: for so many labelled positions; None reads their number from the device. A batch with more has a loss of
            NaN. ``"all"`` then gathers no rows to compare, and masks those of padding.
    """

    def __init__(
        self,
        head: Head,
        batch: Mapping[str, Any],
        positions: str,
        linear: LinearHead,
        room: int | None = None,
    ) -> None:
        self._linear, self._head, self._parts, self._tokens, self._batch = linear, head, head.parts, head.tokens, batch
        self._other_labels = {part: part.labels(batch) for part in self._parts if part != self._tokens}
        labels = self._tokens.labels(batch).flatten()
        self._labelled = chosen_rows(labels != IGNORED_LABEL, room)
        self._labels = self._labelled.of(labels, IGNORED_LABEL)
        self._compared = self._labelled
        if positions == "all":
            mask = self._tokens.row_mask(batch, positions)
            if mask is None or room is not None:
                self._compared = ChosenRows(None, None if mask is None else mask.flatten())
            else:
                self._compared = chosen_rows(mask.flatten(), None)

    def select(self, predictions: Sequence[Prediction], index: Tensor) -> list[Prediction]:
        """Predictions of a larger batch, for the samples of this one, which are at ``index`` in it."""
        selected = []
        for given in predictions:
            if given.linear is None:
                mask = given.head.row_mask(self._batch)
                selected.append(replace(given, values=given.values.index_select(0, index), mask=mask))
            else:
                hidden = given.captured.hidden[0].index_select(0, index)
                captured = Captured([hidden], given.captured.autocast)
                selected.append(self._of_rows(given.head, captured, _gathered(captured, self._compared)))
        return selected

    def run(self, forward: Callable[[], Any]) -> list[Prediction]:
        """The predictions of a pass.

        Raises:
            RuntimeError: the projection did not run exactly once.
        """
        outputs, captured = self._capture(forward)
        return self._read(outputs, captured, _gathered(captured, self._compared))

    def run_clean(self, forward: Callable[[], Any]) -> TaskPass:
        """Task loss, outputs without logits, and predictions of the clean pass."""
        outputs, captured = self._capture(forward)
        labelled = _gathered(captured, self._labelled)
        compared = labelled if self._compared is self._labelled else _gathered(captured, self._compared)
        losses = self._task_losses(outputs, captured, labelled)
        predictions = self._read(outputs, captured, compared)
        if isinstance(outputs, Mapping):
            outputs[self._tokens.field] = None
        else:
            setattr(outputs, self._tokens.field, None)
        return TaskPass(sum(losses[1:], losses[0]), outputs, predictions, part_losses=losses)

    def run_task(self, task: Callable[[], tuple[Tensor, Any]]) -> tuple[Tensor, Any, list[Prediction]]:
        """Task loss and outputs as ``task`` gives them, and predictions of its pass.

        Raises:
            RuntimeError: it showed the projection not exactly one tensor of hidden states.
        """
        (loss, outputs), captured = self._capture(task)
        if self._labelled.overflow is not None:
            loss = torch.where(self._labelled.overflow, torch.nan, loss)
        return loss, outputs, self._read(outputs, captured, _gathered(captured, self._compared))

    def verify(self, model: nn.Module, own: Any) -> str | None:
        """Why the model is not what this takes it for, given what it returned for the batch, or None if it is."""
        with self._linear.capturing() as captured:
            outputs = model(**self._head.inputs(self._batch, model))
        # gathered once, whatever is found, so that ranks that find something else do not wait
        return self._linear.gathered(lambda: self._mismatch(captured, outputs, own))

    def _mismatch(self, captured: Captured, outputs: Any, own: Any) -> str | None:
        mismatch = self._linear.mismatch(captured, self._tokens.logits(outputs))
        if mismatch is not None:
            return mismatch
        losses = self._task_losses(outputs, captured, _gathered(captured, self._labelled))
        if not losses_agree(loss_of(own), sum(losses), captured):
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
            self._of_rows(part, captured, compared)
            if part == self._tokens
            else Prediction(part, part.predictions(outputs, self._batch), part.row_mask(self._batch))
            for part in self._parts
        ]

    def _of_rows(self, part: Head, captured: Captured, compared: Tensor) -> Prediction:
        return Prediction(part, compared, self._compared.valid, linear=self._linear, captured=captured)

    def _task_losses(self, outputs: Any, captured: Captured, labelled: Tensor) -> list[Tensor]:
        """Of each part, the tokens' first: the mean cross-entropy of the labels.

        Of tokens, zero where there is none; the sum over ``num_items_in_batch`` if that is given.
        """

        def cross_entropy() -> Tensor:
            with self._linear.autocast(captured):
                return self._linear.cross_entropy(labelled, self._labels)

        total = self._linear.gathered(cross_entropy, captured.hidden)
        items = self._batch.get("num_items_in_batch")
        loss = total / (self._labelled.count() if items is None else items)
        if self._labelled.overflow is not None:
            loss = torch.where(self._labelled.overflow, torch.nan, loss)
        others = [
            functional.cross_entropy(widened(part.logits(outputs)), labels)
            for part, labels in self._other_labels.items()
        ]
        return [loss, *others]


Passes = LogitPasses | LinearPasses


@dataclass(frozen=True)
class Part:
    """Samples that passes run on.

    Attributes:
        batch: arguments of the model, labels included.
        inputs: the same without labels.
        passes: reads predictions; None where none are compared.
    """

    batch: Mapping[str, Any]
    inputs: Mapping[str, Any]
    passes: Passes | None


@dataclass(frozen=True)
class ChosenRows:
    """Rows of a flat tensor.

    Attributes:
        index: (N,) their places, None for all.
        valid: (N,) bool, which of them count; None for all.
        overflow: whether there were more than room for them, 0-d bool; None where that cannot be.
    """

    index: Tensor | None
    valid: Tensor | None = None
    overflow: Tensor | None = None

    def of(self, flat: Tensor, filler: int) -> Tensor:
        """The entries of (M,) at these rows, ``filler`` where a row does not count."""
        rows = flat if self.index is None else flat.index_select(0, self.index)
        return rows if self.valid is None else torch.where(self.valid, rows, filler)

    def count(self) -> Tensor | int:
        """How many count, 1 at the least."""
        return max(self.index.shape[0], 1) if self.valid is None else self.valid.sum().clamp(min=1)


def chosen_rows(wanted: Tensor, room: int | None) -> ChosenRows:
    """The rows where ``wanted`` (M,) bool is true: as many as there are, or ``room`` for them, M at most."""
    if room is None:
        return ChosenRows(wanted.nonzero().squeeze(1))
    room = min(room, wanted.shape[0])
    index = torch.nonzero_static(wanted, size=room, fill_value=0).squeeze(1)
    count = wanted.sum()
    return ChosenRows(index, torch.arange(room, device=wanted.device) < count, count > room)


def _gathered(captured: Captured, rows: ChosenRows) -> Tensor:
    flat = captured.hidden[0].flatten(0, -2)
    return flat if rows.index is None else flat.index_select(0, rows.index)


def one_sample(head: Head, batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sample with the most labels as a batch of its own, or None where there is no label."""
    labels = head.tokens.labels(batch)
    counts = (labels != IGNORED_LABEL).sum(1)
    if labels.shape[0] == 0 or int(counts.max()) == 0:
        return None
    kept = {key: value for key, value in batch.items() if key != "num_items_in_batch"}
    return select_samples(kept, counts.argmax(keepdim=True), labels.shape[0])


def any_sample(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The first sample as a batch of its own, or the whole batch where there is none."""
    kept = {key: value for key, value in batch.items() if key != "num_items_in_batch"}
    count = sample_count(kept)
    first = torch.arange(min(count, 1), device=next(v.device for v in kept.values() if isinstance(v, Tensor)))
    return select_samples(kept, first, count)


def refusal(model: nn.Module, head: Head, sample: Mapping[str, Any], linear: LinearHead) -> str | None:
    """Why the model cannot be trained through ``linear``, or None: it runs twice on one sample, without dropout."""
    passes = LinearPasses(head, sample, "labelled", linear)
    with torch.no_grad(), dropout_off(model):
        own = model(**sample)
        return "it computes no loss from labels" if loss_of(own) is None else passes.verify(model, own)
