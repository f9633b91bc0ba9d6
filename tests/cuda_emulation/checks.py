"""What the tests of the CUDA kernels on the host share: devices, logits, and how an error is measured."""

import dataclasses
import itertools

import torch
from cuda_emulation.emulated import Device, EmulatedCuda
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = (
    Device(),
    Device(order="descending", largest_grid=3, multiprocessors=1, blocks_per_multiprocessor=1),
    Device(order="shuffled", shuffle_seed=7, multiprocessors=3),
)
SMALLEST_NORMAL = torch.finfo(torch.float32).smallest_normal
UNSTAGED = 2624
"""Shared memory for the room of the reductions and nothing else."""


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def on_every_device(cuda: EmulatedCuda, call, **changes) -> tuple[Tensor | None, ...]:
    """What ``call()`` gives, the same to the last bit in every order of threads and for every size of the grid."""
    results = None
    for device in DEVICES:
        cuda.on(dataclasses.replace(device, **changes))
        again = call()
        results = again if results is None else results
        for first, other in zip(results, again, strict=True):
            assert first is None or torch.equal(bits(first), bits(other)), device
    return results


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


PERTURBATIONS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
KINDS = tuple(itertools.product((3.0, 8.0), (0.0, 24.0), PERTURBATIONS))
"""Size of the logits, what one class is raised by, and size of the perturbation."""


def hard_logits(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(1, rows, V) logits of KINDS, mixed where the rows are few."""
    draw = generator(seed)
    size, raised, change = torch.tensor(KINDS, dtype=torch.float64)[11 * torch.arange(rows) % len(KINDS)].T
    b = size[:, None] * torch.randn(rows, columns, generator=draw, dtype=torch.float64)
    top = torch.randint(columns, (rows,), generator=draw)
    b[torch.arange(rows), top] += raised
    b = b.to(dtype)
    a = b.double() + change[:, None] * torch.randn(rows, columns, generator=draw, dtype=torch.float64)
    return a.to(dtype)[None], b[None]


def rounding(dtype: torch.dtype) -> float:
    return 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2


def relative_errors(gradient: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative L2 error over the whole, and of the median row; rows without gradient count in neither."""
    error = (gradient.double() - expected).flatten(0, 1)
    expected = expected.flatten(0, 1)
    rows = expected.abs().amax(-1) > 0
    assert (error[~rows] == 0).all()
    if not rows.any():
        return 0.0, 0.0
    each = error[rows].norm(dim=-1) / expected[rows].norm(dim=-1)
    return (error.norm() / expected.norm()).item(), each.median().item()


def shared_for(columns: int, element_bytes: int, blocks: int) -> int:
    """A shared memory of which two slices fill a multiprocessor only where ``blocks`` share a row."""
    words = -(-(columns + 2 * (16 // element_bytes) - 2) // (16 // element_bytes))
    return 2 * (UNSTAGED + 2 * 16 * -(-words // blocks)) + 1024
