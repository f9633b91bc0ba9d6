"""Perturbations of samples, kept from one visit to the next."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass
class _Kept:
    """One sample's: a row of its batch's perturbations, and how often it served."""

    deltas: tuple[Tensor, ...]
    row: int
    uses: int


class DeltaStore:
    """The last climbed perturbation of each sample, and how often it served.

    A sample of S positions and H features takes 4 S H bytes a site, on the device of the model: 1.5 MiB at S = 512,
    H = 768; up to twice that while new batches take the place of old ones, which are kept as a whole. Positions are
    those of the batch: a sample must lie in its row as it did before (padding on the right).

    Args:
        lifetime: visits that one perturbation serves, the one that climbed it included.
    """

    def __init__(self, lifetime: int) -> None:
        self._lifetime = lifetime
        self._kept: dict[int, _Kept] = {}

    def clear(self) -> None:
        """Keep nothing."""
        self._kept.clear()

    def take(self, samples: Sequence[int]) -> list[Callable[[tuple[int, ...]], Tensor]] | None:
        """For each site, the perturbations of a batch of (B, S, H); None where one of its samples is due for an ascent.

        Shorter ones are followed by zeros, longer ones cut.
        """
        kept = [self._kept.get(sample) for sample in samples]
        if any(one is None or one.uses >= self._lifetime for one in kept):
            return None
        for one in kept:
            one.uses += 1
        return [partial(_of_shape, [one.deltas[site][one.row] for one in kept]) for site in range(len(kept[0].deltas))]

    def put(self, samples: Sequence[int], deltas: Sequence[Tensor]) -> None:
        """Keep what was climbed for a batch of B, (B C, S, H) a site, C rows a sample."""
        kept = tuple(delta.detach().unflatten(0, (len(samples), -1)) for delta in deltas)
        for row, sample in enumerate(samples):
            self._kept[sample] = _Kept(kept, row, 1)


def _of_shape(deltas: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """(B C, S, H) of B tensors (C, S', H)."""
    length = shape[1]
    fitted = [pad(delta[:, :length], (0, 0, 0, max(length - delta.shape[1], 0))) for delta in deltas]
    return torch.stack(fitted).flatten(0, 1)
