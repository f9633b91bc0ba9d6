"""The precision that the passes of an ascent compute in, where it is not that of the training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from alum_kernels.adversarial.float8_layers import Float8Layers

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class AscentPrecision:
    """Called for a context in which a pass of the model computes in some precision.

    Args:
        model: the model, unwrapped.
        name: of the precision, as ``AdversarialConfig.ascent_dtype``; None leaves it as it is.

    Raises:
        ValueError: the machine, or the model, has no such precision.
    """

    def __init__(self, model: nn.Module, name: str | None) -> None:
        self._model, self._name = model, name
        self._float8 = Float8Layers(model) if name == "float8" else None
        found = next((parameter.dtype for parameter in model.parameters()), torch.float32)
        if name == "float32" and found in _DTYPES.values():
            raise ValueError(f"ascent_dtype: expected a model with fp32 parameters for 'float32', got {found}")

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self._name is None:
            yield
            return
        if self._float8 is not None:
            with self._float8.running():
                yield
            return
        device = next(self._model.parameters()).device.type
        torch.clear_autocast_cache()  # weights that the training's autocast cast to another dtype
        with torch.autocast(device, dtype=_DTYPES.get(self._name), enabled=self._name in _DTYPES):
            yield
        torch.clear_autocast_cache()
