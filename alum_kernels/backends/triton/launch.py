"""How Triton kernels are launched: on the tensor's device, with the arithmetic said explicitly."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

OPTIONS = {"enable_fp_fusion": True}
"""a * b + c is one operation, as in the C++ kernels; formulas that must not fuse use additions only."""


@contextlib.contextmanager
def on_device(tensor: Tensor) -> Iterator[None]:
    """Within the context, launches go to the tensor's CUDA device; a CPU tensor is for the interpreter."""
    if tensor.device.type == "cuda":
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield


def power_of_two(n: int) -> int:
    """Smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()
