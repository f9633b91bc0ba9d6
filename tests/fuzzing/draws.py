"""What a case is drawn from: a seeded source of choices, values of any size, and tensors of any layout.

Everything follows from (seed, number): the same two numbers give the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Choice = TypeVar("Choice")

HALF = (torch.bfloat16, torch.float16)
LARGEST = {torch.float16: 6e4, torch.bfloat16: 3e38, torch.float32: 3e38, torch.float64: 1e300}
"""What drawn values are cut to, so that only those that are meant to be infinite are."""

MASK_DTYPES = (torch.bool, torch.int64, torch.uint8, torch.int32)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's elements."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


@dataclass
class Held:
    """A tensor, the storage that it lies in, and what that held before any call."""

    tensor: Tensor
    storage: Tensor
    before: Tensor
    layout: str

    def unchanged(self) -> bool:
        return same_bits(self.storage, self.before)


def held(tensor: Tensor, storage: Tensor, layout: str) -> Held:
    return Held(tensor, storage, storage.clone(), layout)


def _filler(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What lies around the elements of a tensor and nobody may read: NaN, or a mask's ones."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype)
    return torch.ones(shape, dtype=dtype)


class Draw:
    """The source of one case."""

    def __init__(self, seed: int, number: int) -> None:
        self._numbers = np.random.default_rng((seed, number))
        self._values = torch.Generator().manual_seed(int(self._numbers.integers(2**62)))
        self.small = self.chance(1 / 12)
        """Whether the case is small enough for a backend that Python runs."""

    def choice(self, options: Sequence[Choice], weights: Sequence[float] | None = None) -> Choice:
        shares = None if weights is None else np.array(weights) / sum(weights)
        return options[int(self._numbers.choice(len(options), p=shares))]

    def chance(self, probability: float) -> bool:
        return bool(self._numbers.random() < probability)

    def integer(self, least: int, most: int) -> int:
        """In [least, most]."""
        return int(self._numbers.integers(least, most, endpoint=True))

    def size(self, least: float, most: float) -> float:
        """Log-uniform in [least, most]."""
        return float(np.exp(self._numbers.uniform(np.log(least), np.log(most))))

    def normal(self, *shape: int) -> Tensor:
        """Float64 standard normals."""
        return torch.randn(shape, generator=self._values, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        """Float64 in [0, 1)."""
        return torch.rand(shape, generator=self._values, dtype=torch.float64)

    def indices(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self._values)

    def lay(self, values: Tensor, dtype: torch.dtype, layout: str | None = None, expand: bool = True) -> Held:
        """``values`` rounded to ``dtype`` in some layout; an expanded one repeats a part of them."""
        if dtype.is_floating_point:
            bound = LARGEST[dtype]
            values = torch.where(values.isfinite(), values.clamp(-bound, bound), values)
        values = values.to(dtype).contiguous()
        names = ["contiguous", "offset", "transposed", "stepped", "wide", "expanded"]
        layout = layout or self.choice(names, (5, 2, 2, 2, 2, 1 if expand else 0))
        shape = list(values.shape)
        if values.numel() == 0 or not shape:
            return held(values, values, "contiguous")
        if layout == "offset":
            offset = self.integer(1, 5)
            storage = _filler([values.numel() + 8], dtype)
            tensor = storage[offset : offset + values.numel()].view(shape)
            return held(tensor.copy_(values), storage, f"offset {offset}")
        if layout == "transposed" and len(shape) > 1:
            one, other = sorted(self._numbers.choice(len(shape), 2, replace=False).tolist())
            storage = values.transpose(one, other).contiguous()
            return held(storage.transpose(one, other), storage, f"transposed {one} {other}")
        if layout in ("stepped", "wide"):
            dimension = self.integer(0, len(shape) - 1) if layout == "stepped" else len(shape) - 1
            step = self.integer(2, 3) if layout == "stepped" else 1
            start = self.integer(0, 3)
            storage = _filler([n * step + start + 2 if d == dimension else n for d, n in enumerate(shape)], dtype)
            part = torch.arange(shape[dimension]) * step + start
            storage.index_copy_(dimension, part, values)
            tensor = storage.narrow(dimension, start, shape[dimension] * step)
            tensor = tensor[tuple(slice(None, None, step if d == dimension else 1) for d in range(len(shape)))]
            return held(tensor, storage, f"{layout} {dimension} by {step} from {start}")
        if layout == "expanded":
            dimension = self.integer(0, len(shape) - 1)
            storage = values.narrow(dimension, 0, 1).contiguous()
            return held(storage.expand(shape), storage, f"expanded {dimension}")
        return held(values, values, "contiguous")

    def mask(self, *shape: int) -> Held | None:
        """None, or one of bool or integers 0 and 1."""
        kind = self.choice(("none", "all", "nothing", "random", "ragged"), (5, 1, 1, 4, 2))
        if kind == "none":
            return None
        if kind == "ragged":  # as padding leaves it
            kept = torch.arange(shape[-1]) < self.indices(shape[-1] + 1, *shape[:-1], 1)
        else:
            kept = self.uniform(*shape) < {"all": 2.0, "nothing": -1.0, "random": self.choice((0.2, 0.8))}[kind]
        return self.lay(kept.expand(shape), self.choice(MASK_DTYPES))


def described(tensors: dict[str, Held | None], options: dict[str, Any]) -> str:
    """Shapes, dtypes, layouts and options in a line."""
    parts = [
        f"{name} {tuple(one.tensor.shape)} {str(one.tensor.dtype).removeprefix('torch.')} {one.layout}"
        for name, one in tensors.items()
        if one is not None
    ]
    parts += [
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}" for name, value in options.items()
    ]
    return ", ".join(parts)
