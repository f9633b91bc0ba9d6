"""Gradients that are not finite change no parameter, and end a training that has no others."""

import torch
from torch import nn


class NonFiniteError(ArithmeticError):
    """Gradients were not finite so many times in a row that the training leads nowhere."""


class FiniteGuard:
    """Says before an optimizer step whether its gradients are numbers.

    Args:
        patience: so many times in a row they may not be.
    """

    def __init__(self, patience: int = 10) -> None:
        self._patience, self._in_a_row = patience, 0

    def allows(self, model: nn.Module) -> bool:
        """Whether every gradient is finite; waits for the device.

        Raises:
            NonFiniteError: they were not, ``patience`` times in a row.
        """
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norms = torch._foreach_norm(grads, float("inf"))
        if bool(torch.stack([norm.float() for norm in norms]).isfinite().all()):
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        if self._in_a_row >= self._patience:
            raise NonFiniteError(f"gradients: expected finite ones, got others {self._in_a_row} times in a row")
        return False
