"""The shape of a batch, which chooses a captured graph, and the copy of a batch that such a graph reads."""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor


def shape_of_batch(batch: Mapping[str, Any]) -> Hashable:
    """Shapes and dtypes of the tensors, and everything else as it is.

    Raises:
        ValueError: something that cannot be told apart.
    """
    shape = []
    for name in sorted(batch):
        value = batch[name]
        if isinstance(value, Tensor):
            shape.append((name, tuple(value.shape), value.dtype))
        elif isinstance(value, Mapping):
            shape.append((name, shape_of_batch(value)))
        elif isinstance(value, Hashable):
            shape.append((name, value))
        else:
            raise ValueError(f"batch: expected tensors or hashable values, got a {type(value).__name__} for {name!r}")
    return tuple(shape)


def copied_batch(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch of its own on a device, for a graph to read."""
    copied: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, Mapping):
            copied[name] = copied_batch(value, device)
        else:
            copied[name] = value.to(device, copy=True) if isinstance(value, Tensor) else value
    return copied


def copy_into_batch(static: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
    """The tensors of a batch into those of another one of its shape, without waiting for the device."""
    for name, value in batch.items():
        if isinstance(value, Mapping):
            copy_into_batch(static[name], value)
        elif isinstance(value, Tensor):
            static[name].copy_(value, non_blocking=True)
