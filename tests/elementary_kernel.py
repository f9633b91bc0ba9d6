"""A Triton kernel that is nothing but one function of ``backends/triton/elementary.py``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alum_kernels.backends.triton.elementary import cos_quarter, exp_sum, g_series, log, log1p, sin_quarter


@triton.jit
def _evaluate(x_ptr, y_ptr, NAME: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    if NAME == "exp":
        y = exp_sum(x, x * 0.0)
    elif NAME == "g_series":
        y = g_series(x)
    elif NAME == "log":
        y = log(x)
    elif NAME == "log1p":
        y = log1p(x)
    elif NAME == "cos_quarter":
        y = cos_quarter(x)
    else:
        y = sin_quarter(x)
    tl.store(y_ptr + at, y)


def evaluate(name: str, x: Tensor) -> Tensor:
    """The function of each element; the number of elements is rounded up to a power of two."""
    padded = torch.ones(triton.next_power_of_2(x.numel()))
    padded[: x.numel()] = x
    y = torch.empty_like(padded)
    _evaluate[(1,)](padded, y, NAME=name, BLOCK=padded.numel())
    return y[: x.numel()]
