"""Linear layers in fp8 for the passes of an ascent, by torchao's ``Float8Linear`` over the same weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from alum_kernels.adversarial.model_state import replaced_forwards

MULTIPLE = 16
"""What the sizes of an fp8 product must be multiples of."""


class Float8Layers:
    """Twins in fp8 of a model's linear layers; all but its output projection, and those of sizes that fp8 has not.

    Weights and inputs are scaled by their largest element, anew in every pass, and products accumulate in fp32.

    Args:
        model: the model, unwrapped.
        emulate: round to fp8 and compute in the layer's own precision, on any device.

    Raises:
        ValueError: torchao is not installed, the GPU is older than compute capability 8.9, or no layer fits.
    """

    def __init__(self, model: nn.Module, *, emulate: bool = False) -> None:
        try:
            from torchao.float8 import Float8LinearConfig
            from torchao.float8.float8_linear import Float8Linear
        except ImportError as error:
            raise ValueError(
                "ascent_dtype: expected torchao to be installed for 'float8'; pip install torchao"
            ) from error
        device = next(model.parameters()).device
        capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
        if not (capable or emulate):
            found = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            raise ValueError(
                f"ascent_dtype: expected a GPU of compute capability 8.9 or later for 'float8', got {found}"
            )
        getter = getattr(model, "get_output_embeddings", None)
        projection = getter() if callable(getter) else None
        config = Float8LinearConfig(emulate=emulate)
        self._pairs = [
            (layer, Float8Linear.from_float(layer, config=config).forward)
            for layer in model.modules()
            if type(layer) is nn.Linear
            and layer is not projection
            and not (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE)
        ]
        if not self._pairs:
            raise ValueError(
                f"ascent_dtype: expected linear layers whose sizes are multiples of {MULTIPLE} for 'float8', "
                f"{type(model).__name__} has none"
            )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the context these layers compute in fp8."""
        with replaced_forwards(self._pairs):
            yield
