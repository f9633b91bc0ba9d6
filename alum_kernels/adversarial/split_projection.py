"""A language model's output projection under tensor parallelism, as ``parallelize_module`` makes it (ColwiseParallel).

Its weight is a DTensor with placement Shard(0), its input becomes a replicated DTensor in a hook before the forward,
and a hook after it takes a DTensor whose classes are split. What lies between the two hooks is plain tensors here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alum_kernels.ops.checks import is_dtensor
from alum_kernels.ops.split_head import class_split


class SplitProjection:
    """How the classes of a projection lie on ranks.

    Args:
        projection: with a DTensor weight.

    Raises:
        ValueError: its weight is placed in another way.
    """

    def __init__(self, projection: nn.Linear) -> None:
        self.mesh, self.axis, self.sizes = class_split(projection.weight)

    def obstacle(self, classes: int) -> str | None:
        """Why the projection cannot be taken apart, or None if it can: ``classes`` are probed on every rank."""
        if min(self.sizes) < classes:
            return f"a rank has {min(self.sizes)} of its classes, fewer than {classes}"
        return None

    def as_output(self, few: Tensor) -> Tensor:
        """The logits of a few classes of this rank as the projection's output, split over the ranks."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        placements = [Replicate()] * self.mesh.ndim
        placements[self.axis] = Shard(few.dim() - 1)
        return DTensor.from_local(few, self.mesh, placements, run_check=False)

    def own_logits(self, logits: Any, classes: int) -> Any:
        """Of the few logits that a model returned, those of this rank, whether they were gathered or not."""
        if is_dtensor(logits):
            logits = logits.full_tensor()
        if isinstance(logits, Tensor) and logits.dim() > 0 and logits.shape[-1] == classes * len(self.sizes):
            return logits.split(classes, -1)[self.mesh.get_local_rank(self.axis)]
        return logits

    def first_reason(self, reason: str | None) -> str | None:
        """The reason of the first rank that has one, so that all ranks go the same way. The host waits."""
        reasons: list[str | None] = [None] * len(self.sizes)
        torch.distributed.all_gather_object(reasons, reason, group=self.mesh.get_group(self.axis))
        return next((reason for reason in reasons if reason is not None), None)
