"""Which backend serves an op: the one that was asked for, or the fastest measured one that can."""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("reference", "native", "triton")

FASTEST = {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")}
"""Backends of a device type, fastest first. The order on the CPU is measured (``python -m benchmarks.ops``); the order
on CUDA is a plan that stands until a measurement there is committed under ``benchmarks/results``. Device types not
named here use the reference."""

LIBRARY = torch.library.Library("alum_kernels", "DEF")
"""Schemas of the raw ops. Public functions wrap them; ``backend="reference"`` does without them."""


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot serve this call."""


def unavailable(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, divergence: str | None = None
) -> str | None:
    """Why ``backend`` cannot serve ``op`` on ``device`` for ``dtype``, or None if it can."""
    package = importlib.import_module(f"alum_kernels.backends.{backend}")
    return package.unavailable(op, device, dtype, divergence)


@functools.cache
def _choose(op: str, backend: str | None, device: str, dtype: torch.dtype, divergence: str | None) -> str:
    place = torch.device(device)
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
        reason = unavailable(op, backend, place, dtype, divergence)
        if reason is not None:
            raise BackendUnavailableError(f"backend={backend!r} cannot serve {op} on {device}: {reason}")
        return backend
    for candidate in FASTEST.get(place.type, ("reference",)):
        if unavailable(op, candidate, place, dtype, divergence) is None:
            return candidate
    raise AssertionError("the reference backend serves every call")


@torch.compiler.assume_constant_result
def _chosen(op: str, backend: str | None, device: str, dtype: torch.dtype, divergence: str | None) -> str:
    return _choose(op, backend, device, dtype, divergence)


def choose(op: str, backend: str | None, tensor: Tensor, divergence: str | None = None) -> str:
    """The backend for ``op`` on ``tensor``'s device and dtype.

    Raises:
        ValueError: ``backend`` is no backend's name.
        BackendUnavailableError: ``backend`` cannot serve the call; the message says why.
    """
    return _chosen(op, backend, str(tensor.device), tensor.dtype, divergence)


@functools.cache
def implementation(op: str, backend: str) -> ModuleType:
    """The module that computes ``op`` on ``backend``: ``alum_kernels/backends/<backend>/<op>.py``."""
    return importlib.import_module(f"alum_kernels.backends.{backend}.{op}")
