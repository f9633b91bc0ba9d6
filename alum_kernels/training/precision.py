"""The number format of a training's passes: fp32, or autocast to bf16 or fp16, the latter with a scaled loss.

Parameters, their gradients and the optimizer stay in fp32. Perturbations do as well (:mod:`alum_kernels.adversarial`).
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Casts passes, scales losses and unscales gradients.

    Args:
        name: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        device: of the model.

    Attributes:
        scaler: of the loss; it does nothing but for fp16.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._dtype, self._device = _DTYPES.get(name), device
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> AbstractContextManager[None]:
        """Around a forward pass."""
        return nullcontext() if self._dtype is None else torch.autocast(self._device.type, dtype=self._dtype)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients as they are, before they are looked at; once an update."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer step; none where fp16 overflowed."""
        self.scaler.step(optimizer)

    def end_of_update(self) -> None:
        """The scale of the next update: smaller after an overflow, larger after a long time without one."""
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.scaler.load_state_dict(state)
