"""Optimizer steps of a Trainer that are not finite are left out, and counted."""

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from alum_kernels.adversarial.finite import FiniteGuard, drop_gradients


class FiniteSteps(TrainerCallback):
    """Decides after the last backward of a step, before clipping spreads a NaN, and drops the gradients after it.

    In between the Trainer measures their norm and unscales them, and its log shows what that norm was.

    Attributes:
        guard: of the present training.
    """

    def __init__(self) -> None:
        self.guard = FiniteGuard()
        self._allowed = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.guard = FiniteGuard()

    def decide(self, model: nn.Module, scaler: torch.amp.GradScaler | None) -> None:
        """Whether the step may be made; raises :class:`alum_kernels.NonFiniteError` after too many that may not."""
        self._allowed = self.guard.allows(model, scaler=scaler, drop=False)

    def drop(self, model: nn.Module) -> None:
        """Take the gradients of a step away that may not be made."""
        if not self._allowed:
            drop_gradients(model)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        self.drop(model)
