"""The CUDA kernels, emulated on the host, in the place of the native CPU kernels: a backend for campaigns."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

from cuda_emulation.emulated import Device, EmulatedCuda, compiled
from torch import Tensor

from alum_kernels.backends.native import linear_symmetric_kl, noise_init, projected_ascent, symmetric_kl

DEVICES = (
    Device(),
    Device(order="shuffled", shuffle_seed=3, multiprocessors=1, blocks_per_multiprocessor=1),
    Device(capability=90, order="descending", multiprocessors=3),
)


def emulation_in(folder: Path) -> Callable[[], AbstractContextManager[None]]:
    """Compile the emulation in ``folder`` and return the context within which ``native`` means it."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("cuda: expected g++ on the PATH, found none")
    folder.mkdir(parents=True, exist_ok=True)
    return emulation_of(compiled(compiler, folder))


def emulation_of(cuda: EmulatedCuda) -> Callable[[], AbstractContextManager[None]]:
    """The context within which ``native`` means ``cuda``, each time on another device."""
    entered = 0

    @contextlib.contextmanager
    def emulated() -> Iterator[None]:
        nonlocal entered
        cuda.on(dataclasses.replace(DEVICES[entered % len(DEVICES)]))
        entered += 1
        kernels = _Kernels(cuda)
        with contextlib.ExitStack() as stack:
            for module, name in (
                (noise_init, "noise_init"),
                (projected_ascent, "projected_ascent"),
                (symmetric_kl, "loss"),
                (symmetric_kl, "gradient"),
                (symmetric_kl, "loss_and_gradient"),
                (linear_symmetric_kl, "divergence_rows"),
            ):
                stack.enter_context(mock.patch.object(module, name, getattr(kernels, name)))
            yield

    return emulated


def _fill(outputs: list[Tensor], results: list[Tensor | None]) -> None:
    """What was computed goes where the op expects it; an output that is not wanted is empty."""
    for output, result in zip(outputs, results, strict=True):
        if output.numel() and result is not None:
            output.copy_(result)


class _Kernels:
    """The kernels of the native backend, with its arguments."""

    def __init__(self, cuda: EmulatedCuda) -> None:
        self._cuda = cuda

    def noise_init(
        self, embeds, seed, std_per_token, std, mask, perturbed, delta, distribution, stream, sample_offset
    ) -> None:
        if embeds.numel() == 0:
            return
        results = self._cuda.noise_init(
            embeds,
            seed,
            std=std if std_per_token is None else std_per_token,
            distribution=distribution,
            mask=mask,
            stream=stream,
            sample_offset=sample_offset,
        )
        _fill([perturbed, delta], list(results))

    def projected_ascent(
        self, embeds, grad, delta, seed, std_per_token, std, step_per_token, step_size, epsilon_per_token, epsilon,
        mask, perturbed, new_delta, stats, distribution, stream, sample_offset, norm, normalize, level,
    ) -> None:  # fmt: skip
        results = self._cuda.projected_ascent(
            embeds,
            grad,
            delta,
            seed=seed,
            std=std if std_per_token is None else std_per_token,
            step_size=step_size if step_per_token is None else step_per_token,
            epsilon=epsilon if epsilon_per_token is None else epsilon_per_token,
            norm=norm,
            normalize=normalize,
            level=level,
            distribution=distribution,
            mask=mask,
            stream=stream,
            sample_offset=sample_offset,
        )
        _fill([perturbed, new_delta, stats], list(results))

    def loss(self, a, b, row_weight, rows, statistics, divergence, inv_temperature) -> None:
        if rows.numel() == 0:
            return
        options = {"divergence": divergence, "inv_temperature": inv_temperature}
        _fill([rows, statistics], list(self._cuda.loss(a, b, row_weight, **options)))

    def gradient(self, a, b, statistics, grad_rows, grad_a, grad_b, divergence, gradient, inv_temperature) -> None:
        if statistics.numel() == 0:
            return
        results = self._cuda.gradient(
            a,
            b,
            statistics,
            grad_rows,
            divergence=divergence,
            gradient=gradient,
            inv_temperature=inv_temperature,
            wants_a=grad_a.numel() > 0,
            wants_b=grad_b.numel() > 0,
        )
        _fill([grad_a, grad_b], list(results))

    def loss_and_gradient(
        self, a, b, row_weight, rows, grad_a, grad_b, divergence, gradient, inv_temperature, grad_scale
    ) -> None:
        if rows.numel() == 0:
            return
        results = self._cuda.loss_and_gradient(
            a,
            b,
            row_weight,
            divergence=divergence,
            gradient=gradient,
            inv_temperature=inv_temperature,
            grad_scale=grad_scale,
            wants_b=grad_b.numel() > 0,
        )
        _fill([rows, grad_a, grad_b], list(results))

    def divergence_rows(
        self, first, b, bias, row_weight, rows, grad_a, grad_sum, differences, divergence, gradient, inv_temperature
    ) -> None:
        if rows.numel() == 0:
            return
        results = self._cuda.linear_rows(
            first,
            b,
            bias,
            row_weight,
            differences=differences,
            divergence=divergence,
            gradient=gradient,
            inv_temperature=inv_temperature,
            grad_dtype=grad_a.dtype if grad_a.numel() else None,
            wants_sum=grad_sum.numel() > 0,
        )
        _fill([rows, grad_a, grad_sum], list(results))
