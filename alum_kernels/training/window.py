"""Losses between two lines of the log, summed on the device."""

from typing import Any

import torch
from torch import Tensor

from alum_kernels.training.step import StepFigures


class Window:
    """Running sums since the last :meth:`read`.

    Args:
        device: of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums: Tensor = torch.zeros(2, device=device)
        self._steps = self._skipped = 0

    def add(self, figures: StepFigures) -> None:
        """Take a step in."""
        self._sums += torch.stack([figures.loss, figures.task_loss])
        self._steps += 1
        self._skipped += not figures.updated

    def read(self) -> dict[str, float]:
        """Means of the losses, and steps that changed nothing where there were any; waits for the device."""
        loss, task_loss = (self._sums / max(self._steps, 1)).tolist()
        figures = {"loss": loss, "task_loss": task_loss}
        if self._skipped:
            figures["skipped"] = self._skipped
        self._sums.zero_()
        self._steps = self._skipped = 0
        return figures

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "steps": self._steps, "skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums.copy_(state["sums"])
        self._steps, self._skipped = state["steps"], state["skipped"]
