"""The CUDA kernels, compiled as C++ and run on the CPU, on an emulated device.

Arithmetic, indexing, barriers and shared memory are those of the kernels; speed is not, nor are the functions of CUDA's
own library (``log`` and ``log1p`` in double, once a row).
"""

import ctypes
import dataclasses
import fcntl
import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from alum_kernels.backends.native.projected_ascent import LEVELS, NORMALIZE, NORMS
from alum_kernels.backends.native.symmetric_kl import DIVERGENCES, GRADIENTS

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = (
    CSRC / "cuda" / "symmetric_kl.cu",
    CSRC / "cuda" / "linear_symmetric_kl.cu",
    CSRC / "cuda" / "projected_ascent.cu",
    CSRC / "cuda" / "noise_init.cu",
    HERE / "misuse.cu",
    HERE / "scheduler.cpp",
    HERE / "entry.cpp",
)
# In the order of the enum in csrc/core/arguments.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}
MARGIN = 64
"""Elements around every output that nobody may write, and around inputs: NaN that nobody may read."""


class View(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_int64 * 3),
        ("stride", ctypes.c_int64 * 3),
        ("element_bytes", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


def _view(t: Tensor | None) -> View | None:
    if t is None:
        return None
    rest = (1,) * (3 - t.dim())
    return View(t.data_ptr(), (*t.shape, *rest), (*t.stride(), *rest), t.element_size(), DTYPES.get(t.dtype, -1))


def _poison(elements: int, dtype: torch.dtype) -> Tensor:
    return torch.full((elements * dtype.itemsize,), 0xFF, dtype=torch.uint8).view(dtype)  # NaN of every type


def surrounded(x: Tensor, offset: int = 0) -> Tensor:
    """A contiguous copy of x amid NaN, ``offset`` elements past a 64-byte boundary."""
    whole = _poison(x.numel() + 2 * MARGIN + offset, x.dtype)
    inner = whole[MARGIN + offset : MARGIN + offset + x.numel()].view(x.shape)
    return inner.copy_(x)


class Output:
    """A tensor of NaN to be written by a kernel, in a frame that it may not touch."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0):
        count = torch.Size(shape).numel()
        self.whole = _poison(count + 2 * MARGIN + offset, dtype)
        self.low, self.high = MARGIN + offset, MARGIN + offset + count
        self.tensor = self.whole[self.low : self.high].view(shape)

    def finished(self) -> Tensor:
        frame = torch.cat((self.whole[: self.low], self.whole[self.high :]))
        assert (frame.view(torch.uint8) == 0xFF).all(), "the kernel wrote outside its output"
        return self.tensor


@dataclasses.dataclass(frozen=True)
class Device:
    """What the emulated device is like; the defaults are those of a large one."""

    order: str = "ascending"
    shuffle_seed: int = 1
    shared_limit: int = 227 * 1024
    multiprocessors: int = 2
    blocks_per_multiprocessor: int = 2
    largest_grid: int = 0x7FFFFFFF
    capability: int = 80
    """10 major + minor; clusters from 90 on."""


def compiled(compiler: str, folder: Path) -> "EmulatedCuda":
    """The emulation as a shared object in ``folder``; processes that share it compile it once."""
    # nvcc contracts a * b + c, and so must this; the alignment sanitizer stands for the fault that hardware raises
    flags = ["-std=c++17", "-O1", "-ffp-contract=fast", "-fno-strict-aliasing", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    flags += ["-Wno-unknown-pragmas", "-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
    flags += ["-march=native"] if platform.machine() == "x86_64" else []
    flags += ["-include", "cuda_runtime.h", f"-I{HERE}", f"-I{CSRC}"]

    def build(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        run([compiler, *flags, "-x", "c++", "-c", str(source), "-o", target])
        return target

    def run(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"

    library = folder / "cuda_kernels_on_host.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                objects = list(threads.map(build, SOURCES))
            linked = library.with_suffix(".linked")  # so that a broken link leaves no library behind
            run([compiler, "-shared", "-Wl,--no-undefined", *objects, "-o", str(linked)])
            linked.rename(library)
    return EmulatedCuda(ctypes.CDLL(str(library)))


class EmulatedCuda:
    """Each method is one launch; it raises RuntimeError where the kernel does what hardware leaves undefined."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        library.emulated_launches.restype = ctypes.c_int64
        self.on(Device())

    def on(self, device: Device) -> "EmulatedCuda":
        values = [ORDERS[device.order], *dataclasses.astuple(device)[1:]]
        self._library.emulated_device(*[ctypes.c_int64(v) for v in values])
        return self

    def last_cluster(self) -> int:
        """Blocks of a cluster in the last launch, 1 without."""
        return self._library.emulated_last_cluster()

    def _call(self, name: str, *arguments: Tensor | float | bool | int | None) -> None:
        views = [_view(a) if isinstance(a, Tensor) else a for a in arguments]
        before = self._library.emulated_launches()
        function = self._library[f"emulated_{name}"]
        function.restype = ctypes.c_char_p
        error = function(*[_as_c(v) for v in views])
        if error is not None:
            raise RuntimeError(error.decode())
        assert self._library.emulated_launches() == before + 1, f"{name}: expected one launch"

    def misuse(self, kind: str) -> Tensor:
        """Runs a kernel of ``misuse.cu`` and returns its output."""
        out = torch.zeros(64)
        function = self._library.emulated_misuse
        function.restype = ctypes.c_char_p
        error = function(kind.encode(), ctypes.c_void_p(out.data_ptr()))
        if error is not None:
            raise RuntimeError(error.decode())
        return out

    def noise_init(
        self,
        embeds: Tensor,
        seed: Tensor,
        *,
        std: Tensor | float,
        distribution: str = "normal",
        mask: Tensor | None = None,
        stream: int = 0,
        sample_offset: int = 0,
        return_delta: bool = True,
        output_offset: int = 0,
    ) -> tuple[Tensor, ...]:
        """Embeddings plus delta_0, and delta_0 if wanted."""
        perturbed = Output(embeds.shape, embeds.dtype, output_offset)
        delta = Output(embeds.shape, torch.float32, output_offset)
        self._call(
            "noise_init",
            embeds,
            seed,
            *_magnitude(std),
            mask,
            perturbed.tensor,
            delta.tensor if return_delta else None,
            distribution == "normal",
            stream,
            sample_offset,
        )
        return (perturbed.finished(), delta.finished()) if return_delta else (perturbed.finished(),)

    def projected_ascent(
        self,
        embeds: Tensor,
        grad: Tensor,
        delta: Tensor | None = None,
        *,
        seed: Tensor | None = None,
        std: Tensor | float = 1e-5,
        step_size: Tensor | float,
        epsilon: Tensor | float,
        norm: str,
        normalize: str,
        level: str,
        distribution: str = "normal",
        mask: Tensor | None = None,
        stream: int = 0,
        sample_offset: int = 0,
        return_more: bool = True,
        output_offset: int = 0,
    ) -> tuple[Tensor, ...]:
        """Embeddings plus delta'', and with ``return_more`` delta'' and the statistics."""
        perturbed = Output(embeds.shape, embeds.dtype, output_offset)
        new_delta = Output(embeds.shape, torch.float32, output_offset)
        statistics = Output((*embeds.shape[:2], 4), torch.float32)
        self._call(
            "projected_ascent",
            embeds,
            grad,
            delta,
            seed,
            *_magnitude(std),
            *_magnitude(step_size),
            *_magnitude(epsilon),
            mask,
            perturbed.tensor,
            new_delta.tensor if return_more else None,
            statistics.tensor if return_more else None,
            distribution == "normal",
            stream,
            sample_offset,
            NORMS[norm],
            NORMALIZE[normalize],
            LEVELS[level],
        )
        outputs = (perturbed, new_delta, statistics) if return_more else (perturbed,)
        return tuple(o.finished() for o in outputs)

    def loss(
        self, a: Tensor, b: Tensor, row_weight: Tensor | None = None, *, divergence: str, inv_temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Loss of each row (O, I) and statistics (5, O, I)."""
        rows, statistics = Output(a.shape[:2], torch.float32), Output((5, *a.shape[:2]), torch.float32)
        self._call(
            "divergence_loss",
            a,
            b,
            row_weight,
            rows.tensor,
            statistics.tensor,
            DIVERGENCES[divergence],
            float(inv_temperature),
        )
        return rows.finished(), statistics.finished()

    def gradient(
        self,
        a: Tensor,
        b: Tensor,
        statistics: Tensor,
        grad_rows: Tensor,
        *,
        divergence: str,
        gradient: str,
        inv_temperature: float = 1.0,
        wants_a: bool = True,
        wants_b: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients (O, I, V) of both sides, None where not wanted."""
        sides = [Output(a.shape, a.dtype) if wanted else None for wanted in (wants_a, wants_b)]
        self._call(
            "divergence_gradient",
            a,
            b,
            statistics,
            grad_rows,
            *[None if side is None else side.tensor for side in sides],
            DIVERGENCES[divergence],
            GRADIENTS[gradient],
            float(inv_temperature),
        )
        return tuple(None if side is None else side.finished() for side in sides)

    def loss_and_gradient(
        self,
        a: Tensor,
        b: Tensor,
        row_weight: Tensor | None = None,
        *,
        divergence: str,
        gradient: str,
        inv_temperature: float = 1.0,
        grad_scale: float = 1.0,
        wants_b: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss of each row (O, I) and the gradients of a and, if wanted, b (O, I, V)."""
        rows, grad_a = Output(a.shape[:2], torch.float32), Output(a.shape, a.dtype)
        grad_b = Output(a.shape, a.dtype) if wants_b else None
        self._call(
            "divergence_loss_and_gradient",
            a,
            b,
            row_weight,
            rows.tensor,
            grad_a.tensor,
            grad_b.tensor if wants_b else None,
            DIVERGENCES[divergence],
            GRADIENTS[gradient],
            float(inv_temperature),
            float(grad_scale),
        )
        return rows.finished(), grad_a.finished(), grad_b.finished() if wants_b else None

    def linear_rows(
        self,
        first: Tensor,
        b: Tensor,
        bias: Tensor | None = None,
        row_weight: Tensor | None = None,
        *,
        differences: bool,
        divergence: str,
        gradient: str = "full",
        inv_temperature: float = 1.0,
        grad_scale: float = 1.0,
        grad_dtype: torch.dtype | None = torch.float32,
        wants_sum: bool = True,
        in_place: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """Loss of each row (O, I), and the gradient of a and the sum of both sides' (O, I, V); None if not wanted.

        With ``in_place`` the gradients are written over copies of the logits, framed as outputs are.
        """
        rows = Output(first.shape[:2], torch.float32)
        grad_a = None if grad_dtype is None else Output(first.shape, grad_dtype)
        grad_sum = Output(first.shape, grad_dtype) if wants_sum and grad_a is not None else None
        if in_place:
            first, b = grad_a.tensor.copy_(first), grad_sum.tensor.copy_(b)
        self._call(
            "linear_divergence",
            first,
            b,
            bias,
            row_weight,
            rows.tensor,
            None if grad_a is None else grad_a.tensor,
            None if grad_sum is None else grad_sum.tensor,
            differences,
            DIVERGENCES[divergence],
            GRADIENTS[gradient],
            float(inv_temperature),
            float(grad_scale),
        )
        return tuple(None if output is None else output.finished() for output in (rows, grad_a, grad_sum))


def _magnitude(value: Tensor | float) -> tuple[Tensor | None, float]:
    return (value, 0.0) if isinstance(value, Tensor) else (None, float(value))


def _as_c(value: View | float | bool | int | None):
    if isinstance(value, View):
        return ctypes.byref(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    return None if value is None else ctypes.c_int64(value)
