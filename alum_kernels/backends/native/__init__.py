"""C++ kernels for CPU and CUDA, in one module ``alum_kernels._C`` that is built where a compiler is.

The module registers its ops in the torch library ``alum_kernels_native``; importing it is what makes them callable. A
module that is missing or does not load says why at the first use, not at import.
"""

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType

import torch

from alum_kernels.backends import FUSED_DIVERGENCES

BUILD_RECORD = Path(__file__).parents[2] / "_build.json"
"""What ``setup.py`` built, or why it did not: written beside the package at installation."""


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """The native module and "", or None and the reason why there is none."""
    try:
        return importlib.import_module("alum_kernels._C"), ""
    except ImportError as error:
        if (Path(__file__).parents[3] / "csrc").exists() and not BUILD_RECORD.exists():
            return None, f"not built: run 'pip install --no-build-isolation -e .' in the checkout ({error})"
        reason = json.loads(BUILD_RECORD.read_text())["native"] if BUILD_RECORD.exists() else ""
        return None, f"not built: {reason}" if reason.startswith("skipped") else f"does not load: {error}"


def require() -> None:
    """Raises ImportError with the reason where there is no native module; its ops are registered afterwards."""
    module, reason = load()
    if module is None:
        raise ImportError(f"alum_kernels: the native module {reason}")


def unavailable(op: str, device: torch.device, dtype: torch.dtype, divergence: str | None) -> str | None:
    """Why this backend cannot serve ``op`` there, or None if it can."""
    module, reason = load()
    if module is None:
        return reason
    if dtype == torch.float64:
        return "float64 is served by the reference backend only"
    if divergence is not None and divergence not in FUSED_DIVERGENCES:
        return f"{divergence} is served by the reference backend only"
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"it has kernels for cpu and cuda, not for {device.type}"
    return _cuda_unavailable(module, device)


@functools.cache
def _cuda_unavailable(module: ModuleType, device: torch.device) -> str | None:
    built = module.build_info()
    if not built["cuda_architectures"]:
        return "it was built without CUDA (no nvcc, or ALUM_CUDA=0)"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not built["cuda_stream_resolved"]:
        return "libtorch_cuda did not provide aoti_torch_get_current_cuda_stream"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < 80:
        return f"it needs compute capability 8.0, {device} has {major}.{minor}"
    return None
