"""Which samples a batch has, and how they become tokens.

The order of an epoch is a function of the seed and the epoch, so that a place in it is a number and needs no state.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]

POOL = 16
"""Batches among which examples are sorted by length."""


@dataclass(frozen=True)
class LabelledText:
    """Sentences, or pairs of them, with class indices, or with scores where the task is a regression."""

    texts: list[tuple[str, ...]]
    labels: list[int] | list[float]

    def __len__(self) -> int:
        return len(self.texts)

    def lengths(self) -> list[int]:
        """Characters of each example, which tell roughly how many tokens it has."""
        return [sum(map(len, texts)) for texts in self.texts]


def encode_texts(tokenizer: Any, texts: LabelledText, chosen: Sequence[int], length: int) -> Batch:
    """One padded batch of the chosen examples, of ``length`` tokens at most."""
    rows = [texts.texts[index] for index in chosen]
    pairs = [row[1] for row in rows] if len(rows[0]) == 2 else None
    encoded = tokenizer(
        [row[0] for row in rows], pairs, truncation=True, max_length=length, padding=True, return_tensors="pt"
    )
    return {**encoded, "labels": torch.tensor([texts.labels[index] for index in chosen])}


def random_groups(
    count: int, size: int, generator: torch.Generator, lengths: Sequence[int] | None = None
) -> list[Tensor]:
    """All of ``count`` examples in groups of ``size``, in random order; one group may be smaller.

    With ``lengths`` examples of similar length lie side by side, within every ``POOL`` groups, which leaves little
    padding; the groups come in random order.
    """
    order = torch.randperm(count, generator=generator)
    if lengths is None:
        return list(order.split(size))
    return [group for pool in order.split(size * POOL) for group in _by_length(pool, size, generator, lengths)]


def _by_length(pool: Tensor, size: int, generator: torch.Generator, lengths: Sequence[int]) -> list[Tensor]:
    ordered = torch.tensor(sorted(pool.tolist(), key=lengths.__getitem__))
    groups = ordered.split(size)
    return [groups[place] for place in torch.randperm(len(groups), generator=generator).tolist()]


class Order:
    """The batches of a whole training by number, each as the indices of its samples.

    Args:
        count: samples of the data.
        size: samples of a batch; what an epoch leaves over is left out of it.
        seed: of the order.
        lengths: of the samples, to lay those of similar length side by side.

    Raises:
        ValueError: there are fewer samples than a batch takes.
    """

    def __init__(self, count: int, size: int, seed: int, lengths: Sequence[int] | None = None) -> None:
        if count < size:
            raise ValueError(f"expected at most the {count} samples that there are, got {size}")
        self._count, self._size, self._seed, self._lengths = count, size, seed, lengths
        self.epoch_batches = count // size
        self._epoch = -1
        self._groups: list[list[int]] = []

    def batch(self, number: int) -> tuple[int, list[int]]:
        """The epoch that batch ``number`` is of, and its samples."""
        epoch, place = divmod(number, self.epoch_batches)
        if epoch != self._epoch:
            digest = hashlib.blake2b(f"{self._seed} {epoch}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
            groups = random_groups(self._count, self._size, generator, self._lengths)
            self._groups = [group.tolist() for group in groups if len(group) == self._size]
            self._epoch = epoch
        return epoch, self._groups[place]
