"""Triton kernels: compiled on CUDA devices, interpreted on the CPU where ``TRITON_INTERPRET=1`` was set in time."""

import functools
import os

import torch

from alum_kernels.backends import FUSED_DIVERGENCES


@functools.cache
def _import_error() -> str | None:
    try:
        import triton  # noqa: F401 - importing is the question
    except ImportError as error:
        return f"triton does not import: {error}"
    return None


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter (decided when they are defined)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable(op: str, device: torch.device, dtype: torch.dtype, divergence: str | None) -> str | None:
    """Why this backend cannot serve ``op`` there, or None if it can."""
    if (reason := _import_error()) is not None:
        return reason
    if dtype == torch.float64:
        return "float64 is served by the reference backend only"
    if divergence is not None and divergence not in FUSED_DIVERGENCES:
        return f"{divergence} is served by the reference backend only"
    if device.type == "cuda":
        return None
    if device.type == "cpu" and interpreted():
        return None
    if device.type == "cpu":
        return "CPU tensors need the interpreter: set TRITON_INTERPRET=1 before the first import of triton"
    return f"it serves CUDA devices, not {device.type}"
