"""The example of a loop over processes, with a share that is empty or with a row that is not finite.

Run as a program, ``python tests/loop_faults.py FAULT``, it is one rank of torchrun.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from examples import distributed_loop

SPOILT_STEP = 5

Set = Callable[[Any, str, Any], None]
"""As ``setattr``."""


def without_samples(put: Set) -> None:
    """One sample a batch: all ranks but the first have none."""
    put(distributed_loop, "SAMPLES", 1)


def with_a_row_of_nan(put: Set) -> None:
    """In every pass of one step the prediction of the last sample of all ranks is NaN."""
    steps: list[int] = []
    make, forward = distributed_loop.global_batch, distributed_loop.Classifier.forward
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1

    def global_batch(step: int) -> dict[str, Tensor]:
        steps.append(step)
        return make(step)

    def spoilt(self: torch.nn.Module, input_ids: Tensor) -> Tensor:
        logits = forward(self, input_ids)
        if not last or steps[-1] != SPOILT_STEP:
            return logits
        rows = torch.arange(len(logits), device=logits.device).unsqueeze(1)
        return torch.where(rows == len(logits) - 1, logits * torch.nan, logits)

    put(distributed_loop, "global_batch", global_batch)
    put(distributed_loop.Classifier, "forward", spoilt)


FAULTS = {"no samples": without_samples, "a row of NaN": with_a_row_of_nan}


if __name__ == "__main__":
    FAULTS[sys.argv[1]](setattr)
    distributed_loop.main()
