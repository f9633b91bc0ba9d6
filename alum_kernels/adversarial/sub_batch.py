"""The samples of a batch on which alone the regulariser is computed, so that its sum stays unbiased.

    J = (sum over the compared rows of m of B samples) / (m / B  times the compared rows of all B)

Each sample is as likely to be chosen as any other, so the expectation over the choice is the mean over the rows of the
whole batch, also where samples have different numbers of rows (tokens). (The mean over the chosen rows would be a ratio
of two random numbers, and biased.)

Where the fraction is p / q in lowest terms, q <= 64, and a batch begins and ends at multiples of q in the global batch,
p samples are chosen of each q consecutive places. That is a function of the global batch alone: splitting it over ranks
or accumulated batches at such places changes neither what is chosen nor its noise. Elsewhere the choice is among the
whole batch at hand, which is unbiased too, but another one when the batch is split otherwise.

With shared dropout a perturbed pass repeats the masks of the clean pass, which are drawn for a batch of its size. Where
they are kept (``dropout_masks.py``), the chosen samples have their rows of them; elsewhere the clean pass runs in two
parts, the chosen samples and the rest.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alum_kernels.adversarial.heads import Head
from alum_kernels.adversarial.passes import LinearPasses, Part, TaskPass
from alum_kernels.adversarial.row_losses import label_count, label_sum, part_weight
from alum_kernels.adversarial.samples import sample_count, select_samples
from alum_kernels.ops.noise_init import noise_init

SELECTION_STREAM = 2**31 - 1
"""Stream of the noise that chooses; perturbed sites have 0, 1, ..."""


LARGEST_BLOCK = 64
"""Places of the global batch that are chosen among at once, at the most."""


class Choice(NamedTuple):
    """Which samples of a batch are perturbed.

    Attributes:
        index, rest: (m,) and (B - m,) places in the batch of the chosen and of the others, both rising, int64.
        noise_offset: place of the first chosen one's noise in that of the global batch.
    """

    index: Tensor
    rest: Tensor
    noise_offset: int


def choose(batch: Mapping[str, Any], fraction: float, seed: Tensor, sample_offset: int) -> Choice | None:
    """``round(fraction B)`` of B samples, one at least; None where all are chosen.

    A function of the seed and of the samples' places in the global batch, those with the smallest keys of each block;
    nothing waits for the device.
    """
    count = sample_count(batch)
    chosen = max(round(fraction * count), 1)
    if chosen >= count:
        return None
    strata = _strata(fraction, count, sample_offset)
    block, of_block = strata or (count, chosen)
    keys = noise_init(
        torch.zeros(count, 1, 1, device=seed.device),
        std=1.0,
        distribution="uniform",
        seed=seed,
        stream=SELECTION_STREAM,
        sample_offset=sample_offset,
    )
    order = keys.view(-1, block).argsort(dim=1, stable=True)
    order = order + torch.arange(0, count, block, device=seed.device).unsqueeze(1)
    index, rest = order[:, :of_block].flatten().sort().values, order[:, of_block:].flatten().sort().values
    # of the whole blocks before this batch, so many were chosen
    return Choice(index, rest, sample_offset if strata is None else sample_offset // block * of_block)


def _strata(fraction: float, count: int, sample_offset: int) -> tuple[int, int] | None:
    """(q, p) of the fraction p / q, where whole blocks of q places are before and in a batch; None elsewhere."""
    ratio = Fraction(fraction).limit_denominator(LARGEST_BLOCK)
    p, q = ratio.numerator, ratio.denominator
    whole = count % q == 0 and sample_offset % q == 0
    return (q, p) if whole and math.isclose(p / q, fraction, rel_tol=1e-12) else None


@dataclass(frozen=True)
class SubBatch:
    """The samples that are perturbed, and those that are not.

    Attributes:
        head: what the model predicts.
        chosen, rest: each, with what reads its predictions.
        chosen_index, rest_index, noise_offset: as of :class:`Choice`.
        splits: the clean pass runs in two parts.
    """

    head: Head
    chosen: Part
    rest: Part
    chosen_index: Tensor
    rest_index: Tensor
    noise_offset: int
    splits: bool

    @property
    def fraction(self) -> float:
        """m / B."""
        return self.chosen_index.shape[0] / self.samples

    def selected(self, task: TaskPass, embeds: Sequence[Tensor]) -> tuple[TaskPass, list[Tensor]]:
        """A clean pass over the whole batch, and its tensors at the sites, as the perturbed passes see them."""
        chosen = self.chosen.passes.select(task.predictions, self.chosen_index)
        rows = [part.rows() for part in task.predictions]
        of_chosen = [_select_rows(tensor, self.chosen_index, self.samples) for tensor in embeds]
        shares = self._shares([part.rows() for part in chosen], rows, task.loss)
        return task._replace(predictions=chosen, shares=shares), of_chosen

    def joined(self, chosen: TaskPass, rest: TaskPass) -> TaskPass:
        """A clean pass in two parts as one; losses are weighted by their labels, as the mean over the batch does."""
        pairs = zip(chosen.predictions, rest.predictions, strict=True)
        of_chosen = [part.rows() for part in chosen.predictions]
        rows = [left.rows() + right.rows() for left, right in pairs]
        shares = self._shares(of_chosen, rows, chosen.loss)
        outputs = self._merged(chosen.outputs, rest.outputs)
        return TaskPass(self._loss(chosen, rest), outputs, chosen.predictions, shares)

    @property
    def samples(self) -> int:
        """B."""
        return self.chosen_index.shape[0] + self.rest_index.shape[0]

    def _shares(self, chosen: Sequence[Tensor | int], rows: Sequence[Tensor | int], loss: Tensor) -> Tensor:
        """(heads,) rows of the chosen over fraction times all rows: what turns a mean over the chosen into J.

        On the device of ``loss``, fp32 (fp64 for fp64).
        """
        dtype = torch.promote_types(loss.dtype, torch.float32)
        shares = []
        for of_chosen, of_all in zip(chosen, rows, strict=True):
            if isinstance(of_all, Tensor):
                shares.append(of_chosen.to(dtype) / (self.fraction * of_all.to(dtype).clamp(min=1)))
            else:  # a fill, not a copy from the host, which would wait
                share = of_chosen / (self.fraction * max(of_all, 1))
                shares.append(torch.full((), share, dtype=dtype, device=loss.device))
        return torch.stack(shares)

    def _loss(self, chosen: TaskPass, rest: TaskPass) -> Tensor:
        if self.head.name == "question_answering":
            return self._answer_loss((chosen.outputs, rest.outputs))
        if self.chosen.batch.get("num_items_in_batch") is not None:
            return chosen.loss + rest.loss
        counts = [label_count(self.head, part.batch) for part in (self.chosen, self.rest)]
        # the mean over no label is 0 / 0
        sums = [
            torch.where(count > 0, loss, 0) * count if isinstance(count, Tensor) else loss * count
            for loss, count in zip((chosen.loss, rest.loss), counts, strict=True)
        ]
        total = counts[0] + counts[1]
        return (sums[0] + sums[1]) / (total.clamp(min=1) if isinstance(total, Tensor) else total)

    def _answer_loss(self, outputs: Sequence[Any]) -> Tensor:
        """The models' own, of starts and ends that are means over different samples: one may lie outside the sequence.

        The sum of two such means cannot be weighted, so the cross-entropies are taken again.
        """
        means = []
        for part in self.head.parts:
            pairs = zip((self.chosen, self.rest), outputs, strict=True)
            losses, counts = zip(*(label_sum(part, given, side.batch) for side, given in pairs), strict=True)
            means.append(sum(losses) / sum(counts).clamp(min=1))
        return part_weight(self.head) * sum(means)

    def _merged(self, chosen: Any, rest: Any) -> Any:
        """What the model would have returned for the whole batch: its tensors of samples, in order; no loss."""
        if isinstance(chosen, Tensor):
            sizes = (self.chosen_index.shape[0], self.rest_index.shape[0])
            if chosen.dim() == 0 or (chosen.shape[0] % sizes[0] or rest.shape[0] % sizes[1]):
                return None
            order = torch.cat([self.chosen_index, self.rest_index]).argsort()
            return _select_rows(torch.cat([chosen, rest]), order, self.samples)
        if isinstance(chosen, Mapping):
            return type(chosen)(**{key: self._merged(value, rest.get(key)) for key, value in chosen.items()})
        if isinstance(chosen, tuple | list):
            parts = [self._merged(left, right) for left, right in zip(chosen, rest, strict=True)]
            return type(chosen)(*parts) if hasattr(chosen, "_fields") else type(chosen)(parts)
        if is_dataclass(chosen):
            names = [field.name for field in fields(chosen)]
            return replace(chosen, **{name: self._merged(getattr(chosen, name), getattr(rest, name)) for name in names})
        return None


def sub_batch_of(
    head: Head,
    whole: Part,
    choice: Choice,
    make_part: Callable[[Mapping[str, Any]], Part],
    *,
    shares: bool,
    splits: bool,
) -> SubBatch:
    """The two parts of a batch.

    Args:
        head: what the model predicts.
        whole: the batch.
        choice: which samples are perturbed.
        make_part: makes a :class:`Part` of a batch.
        shares: perturbed passes repeat the clean pass's dropout, for which it may have to run in two parts.
        splits: it does.

    Raises:
        ValueError: the loss of such a head, or of such a batch, cannot be put together from two parts, which
            ``shares`` would need on some devices.
    """
    if shares and head.name == "pretraining":
        raise ValueError(
            "dropout: expected 'independent' or 'off' with adversarial_fraction < 1 for a pretraining head, whose two "
            "losses have different counts, got 'shared'"
        )
    own_divisor = whole.batch.get("num_items_in_batch") is not None and not isinstance(whole.passes, LinearPasses)
    if shares and own_divisor and head.name != "question_answering":
        raise ValueError(
            "batch: expected no 'num_items_in_batch' with adversarial_fraction < 1 and dropout='shared' for a "
            "model that goes through its logits, since it may divide by it or not"
        )
    count = sample_count(whole.batch)
    indices = choice.index, choice.rest
    parts = [make_part(select_samples(whole.batch, index, count)) for index in indices]
    return SubBatch(head, *parts, *indices, choice.noise_offset, splits)


def _select_rows(tensor: Tensor, index: Tensor, samples: int) -> Tensor:
    """The rows of some samples; of multiple choice, a sample has one a choice."""
    choices = tensor.shape[0] // samples
    if choices == 1:
        return tensor.index_select(0, index)
    rows = index.unsqueeze(1) * choices + torch.arange(choices, device=index.device)
    return tensor.index_select(0, rows.flatten())
