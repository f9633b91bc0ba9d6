"""Argument checks that the public ops share. Every message names the argument, what came and what is expected."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


DISTRIBUTIONS = ("normal", "uniform")


def shape_of(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def check_choice(name: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        listed = ", ".join(repr(word) for word in valid)
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}")


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor, without importing what makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def check_plain(name: str, tensor: Any) -> None:
    """Raises TypeError for a DTensor: kernels read the memory of one rank."""
    if is_dtensor(tensor):
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor with placements {tensor.placements}; {name}.full_tensor() "
            f"gives the whole, {name}.to_local() this rank's part"
        )


def check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    check_plain(name, tensor)
    if tensor.dtype not in FLOATING:
        listed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise TypeError(f"{name}: expected a dtype among {listed}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_rank(name: str, tensor: Tensor, rank: int, axes: str) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimensions {axes}, got shape {shape_of(tensor)}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """Same shape and device as ``other``, and the same dtype unless ``dtype`` is false."""
    if tensor.shape != other.shape:
        raise ValueError(f"{name}: expected shape {shape_of(other)} as {other_name}, got {shape_of(tensor)}")
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as {other_name}, got {tensor.device}")
    if dtype and tensor.dtype != other.dtype:
        raise TypeError(f"{name}: expected dtype {other.dtype} as {other_name}, got {tensor.dtype}")


def check_mask(mask: Tensor | None, shape: Sequence[int], device: torch.device) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
    check_plain("mask", mask)
    if mask.dtype not in MASK_DTYPES:
        raise TypeError(f"mask: expected bool or integers 0 and 1, got {mask.dtype}")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"mask: expected shape {tuple(shape)}, got {shape_of(mask)}")
    if mask.device != device:
        raise ValueError(f"mask: expected device {device}, got {mask.device}")


def check_magnitude(name: str, value: float, expected: str = "a number") -> float:
    """A finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if not 0 <= value < math.inf:  # false for NaN; math.isfinite does not trace
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return float(value)


def check_count(name: str, value: int, least: int = 0) -> int:
    """An int that is at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected a number >= {least}, got {value}")
    return value


def check_process_group(name: str, group: Any) -> None:
    """Raises TypeError for what is neither None nor a process group with this rank in it (others get an int for it)."""
    if group is None or (distributed.is_available() and isinstance(group, distributed.ProcessGroup)):
        return
    raise TypeError(
        f"{name}: expected a torch.distributed.ProcessGroup that this rank is in, or None, got {type(group).__name__}"
    )


def per_token(name: str, value: float | Tensor, embeds: Tensor) -> tuple[Tensor | None, float]:
    """A magnitude as the kernels take it: (None, float) or ((B, S) fp32 view, 0.0) of a 0-d, (B,) or (B, S) tensor.

    The values of a tensor are not looked at: that would stop the host until the device has caught up.
    """
    if not isinstance(value, Tensor):
        return None, check_magnitude(name, value, "a float or an fp32 tensor")
    check_plain(name, value)
    batch, length = embeds.shape[:2]
    if value.dtype != torch.float32:
        raise TypeError(f"{name}: expected a float or an fp32 tensor, got {value.dtype}")
    if value.device != embeds.device:
        raise ValueError(f"{name}: expected device {embeds.device}, got {value.device}")
    if value.dim() == 0:
        return value.detach().expand(batch, length), 0.0
    if value.dim() == 1 and value.shape[0] == batch:
        return value.detach().unsqueeze(1).expand(batch, length), 0.0
    if value.dim() == 2 and value.shape == embeds.shape[:2]:
        return value.detach(), 0.0
    raise ValueError(f"{name}: expected shape (), ({batch},) or ({batch}, {length}), got {shape_of(value)}")


def as_seed(seed: Tensor | int | None, device: torch.device) -> Tensor:
    """One int64 on ``device``. None draws it from the device's default generator; an int is written there."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, bool):
        raise TypeError("seed: expected a one-element int64 tensor, an int or None, got bool")
    if isinstance(seed, int):
        return torch.full((1,), seed, dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor):
        raise TypeError(f"seed: expected a one-element int64 tensor, an int or None, got {type(seed).__name__}")
    check_plain("seed", seed)
    if seed.dtype != torch.int64:
        raise TypeError(f"seed: expected dtype torch.int64, got {seed.dtype}")
    if seed.numel() != 1:
        raise ValueError(f"seed: expected one element, got shape {shape_of(seed)}")
    if seed.device != device:
        raise ValueError(f"seed: expected device {device}, got {seed.device}")
    return seed.reshape(1)


def check_noise(distribution: str, stream: int, sample_offset: int) -> None:
    check_choice("distribution", distribution, DISTRIBUTIONS)
    if stream < 0 or stream >= 2**32:
        raise ValueError(f"stream: expected 0 <= stream < 2^32, got {stream}")
    if sample_offset < 0:
        raise ValueError(f"sample_offset: expected a number >= 0, got {sample_offset}")
