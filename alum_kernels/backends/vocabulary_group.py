"""Ranks that hold a slice of a vocabulary each, and what they send each other.

For a chunk of C rows and hidden states of H features: one all-gather of a few numbers a row, from which every rank
forms the same sums in rank order, and one all-reduce of the (2C, H) or (C, H) gradients of the hidden states. Nothing
of the vocabulary's size is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def gathered(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """(R, ...) of the tensors of all ranks, in rank order."""
    everywhere = tensor.new_empty((dist.get_world_size(group), *tensor.shape))
    dist.all_gather(list(everywhere.unbind(0)), tensor.contiguous(), group=group)
    return everywhere


@dataclass(frozen=True)
class VocabularySplit:
    """The classes of each rank, in rank order: rank r has ``sizes[r]``, from the sum of those before it.

    Attributes:
        group: the ranks.
        sizes: how many classes each has; 0 is possible, as where a DTensor has fewer rows than ranks need.
    """

    group: ProcessGroup
    sizes: tuple[int, ...]

    @property
    def rank(self) -> int:
        """This one's place in the group."""
        return dist.get_rank(self.group)

    @property
    def offset(self) -> int:
        """The first class of this rank."""
        return sum(self.sizes[: self.rank])

    def gather(self, tensor: Tensor) -> Tensor:
        """(R, ...) of the tensors of all ranks, in rank order."""
        return gathered(tensor, self.group)

    def summed(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Start to add up ``tensor`` over the ranks, in place; calling the result waits, and gives it."""
        work = dist.all_reduce(tensor, group=self.group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return tensor

        return finish
