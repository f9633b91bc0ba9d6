"""What the op benchmarks call: one case is one op on one shape, and the providers that compute it.

Providers:
    eager     plain PyTorch (eager_kl.py, eager_ascent.py)
    compile   the same under torch.compile
    liger     the nearest that Liger-Kernel has, on CUDA (eager_kl.py says how it differs)
    native    this library's C++/CUDA kernels
    triton    this library's Triton kernels, on CUDA
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alum_kernels import noise_init, projected_ascent, symmetric_kl, symmetric_kl_grad
from alum_kernels.ops.dispatch import unavailable
from alum_kernels.ops.projected_ascent import LEVELS, NORMALIZE, NORMS

from .eager_ascent import eager_noise_and_ascent, eager_noise_init, eager_projected_ascent
from .eager_kl import compiled_symmetric_kl, eager_symmetric_kl, liger_symmetric_kl
from .timing import Call

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

LOGITS = ((512, 30522, "fp32"), (512, 30522, "bf16"), (65536, 3, "fp32"))
LOGITS_ON_CUDA = ((8192, 30522, "bf16"), (8192, 50265, "bf16"), (4096, 128256, "bf16"), (4096, 30522, "fp32"))
EMBEDDINGS = (16, 128, 768)
EMBEDDINGS_ON_CUDA = (64, 512, 1024)

NOISE_STD, STEP_SIZE, EPSILON = 1e-5, 1e-3, 1e-5
COMPILED_ASCENTS = (("linf", "none", "token"), ("linf", "linf", "sequence"), ("l2", "l2", "sequence"))
QUICK_ASCENTS = (*COMPILED_ASCENTS, ("linf_rescale", "none", "token"), ("linf", "sign", "token"))


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    Attributes:
        op: name of the public op, or of the pair.
        label: shape, dtype and options.
        bytes_moved: what the op reads and writes at the least in the form it is designed in: the logits once for the
            loss and once for the gradient (once for both where one launch does both), each gradient once; embeddings,
            gradient, delta and result once.
        build: makes the inputs and the calls of each provider; inputs live as long as the calls.
    """

    op: str
    label: str
    bytes_moved: int
    build: Callable[[], dict[str, Call]]


def own_backends(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The library's kernels that serve here: native, and Triton where it is compiled."""
    names = ("native", "triton") if device.type == "cuda" else ("native",)
    return [name for name in names if unavailable(op, name, device, dtype) is None]


def logits_pair(rows: int, classes: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Adversarial and clean logits, 0.1 apart."""
    generator = torch.Generator(device).manual_seed(0)
    b = 3 * torch.randn(rows, classes, device=device, generator=generator)
    a = b + 0.1 * torch.randn(rows, classes, device=device, generator=generator)
    return a.to(dtype), b.to(dtype)


def _symmetric_kl_calls(
    rows: int, classes: int, dtype: torch.dtype, device: torch.device, compiled: bool
) -> dict[str, Call]:
    a, b = (side.requires_grad_() for side in logits_pair(rows, classes, dtype, device))

    def both_ways(divergence: Callable[[Tensor, Tensor], Tensor]) -> Call:
        def call() -> object:
            loss = divergence(a, b)
            return loss, torch.autograd.grad(loss, (a, b))

        return call

    calls = {"eager": both_ways(eager_symmetric_kl)}
    if compiled:
        calls["compile"] = both_ways(compiled_symmetric_kl())
    if device.type == "cuda" and (liger := liger_symmetric_kl()) is not None:
        calls["liger"] = both_ways(liger)
    for backend in own_backends("symmetric_kl", device, dtype):
        calls[backend] = both_ways(lambda x, y, backend=backend: symmetric_kl(x, y, backend=backend))
    return calls


def _symmetric_kl_grad_calls(
    rows: int, classes: int, dtype: torch.dtype, device: torch.device, compiled: bool
) -> dict[str, Call]:
    a, b = logits_pair(rows, classes, dtype, device)
    leaf = a.clone().requires_grad_()

    def adversarial_side(divergence: Callable[[Tensor, Tensor], Tensor]) -> Call:
        def call() -> object:
            loss = divergence(leaf, b)
            return loss, torch.autograd.grad(loss, leaf)

        return call

    calls = {"eager": adversarial_side(eager_symmetric_kl)}
    if compiled:
        calls["compile"] = adversarial_side(compiled_symmetric_kl())
    for backend in own_backends("symmetric_kl", device, dtype):
        calls[backend] = lambda backend=backend: symmetric_kl_grad(a, b, backend=backend)
    return calls


def _both_gradients_calls(
    rows: int, classes: int, dtype: torch.dtype, device: torch.device, compiled: bool
) -> dict[str, Call]:
    """As ``_symmetric_kl_calls``, but the library's own upstream factor: loss and both gradients in one launch."""
    calls = _symmetric_kl_calls(rows, classes, dtype, device, compiled)
    a, b = logits_pair(rows, classes, dtype, device)
    for backend in own_backends("symmetric_kl", device, dtype):
        calls[backend] = lambda backend=backend: symmetric_kl_grad(a, b, clean_gradient=True, backend=backend)
    return calls


def divergence_cases(
    shapes: tuple[tuple[int, int, str], ...], device: torch.device, compiled: bool = True
) -> Iterator[Case]:
    """Loss and both gradients, loss and adversarial gradient in one, loss and both gradients in one."""
    for rows, classes, storage in shapes:
        dtype = DTYPES[storage]
        size = rows * classes * dtype.itemsize
        label = f"({rows}, {classes}) {storage}"
        arguments = (rows, classes, dtype, device, compiled)
        yield Case("symmetric_kl", label, 6 * size, lambda arguments=arguments: _symmetric_kl_calls(*arguments))
        yield Case(
            "symmetric_kl_grad", label, 3 * size, lambda arguments=arguments: _symmetric_kl_grad_calls(*arguments)
        )
        yield Case(
            "symmetric_kl_grad, both",
            label,
            4 * size,
            lambda arguments=arguments: _both_gradients_calls(*arguments),
        )


def noise_cases(
    shape: tuple[int, int, int], device: torch.device, compiled: bool = True, distributions=("normal", "uniform")
) -> Iterator[Case]:
    """``noise_init`` with a given seed."""
    size = 4 * shape[0] * shape[1] * shape[2]

    def build(distribution: str) -> dict[str, Call]:
        embeds = torch.randn(shape, device=device)
        seed = torch.zeros(1, dtype=torch.int64, device=device)
        calls: dict[str, Call] = {"eager": lambda: eager_noise_init(embeds, NOISE_STD, distribution)}
        if compiled:
            quick = torch.compile(eager_noise_init, dynamic=False)
            calls["compile"] = lambda: quick(embeds, NOISE_STD, distribution)
        for backend in own_backends("noise_init", device, embeds.dtype):
            calls[backend] = lambda backend=backend: noise_init(
                embeds, std=NOISE_STD, distribution=distribution, seed=seed, backend=backend
            )
        return calls

    for distribution in distributions:
        label = f"{shape} fp32 {distribution}"
        yield Case("noise_init", label, 2 * size, lambda distribution=distribution: build(distribution))


def every_ascent() -> list[tuple[str, str, str]]:
    """(norm, normalize, level), one level where it makes no difference."""
    return [
        (norm, normalize, level)
        for norm, normalize, level in itertools.product(NORMS, NORMALIZE, LEVELS)
        if level == "token" or norm in ("l2", "linf_rescale") or normalize in ("linf", "l2")
    ]


def ascent_cases(
    shape: tuple[int, int, int],
    device: torch.device,
    ascents: Sequence[tuple[str, str, str]],
    compiled: bool = True,
) -> Iterator[Case]:
    """``projected_ascent`` of a stored delta, and the pair that a step with K = 1 runs.

    The pair is noise_init and projected_ascent: the library's kernels draw delta_0 twice from its seed and never store
    it, the others store it.
    """
    size = 4 * shape[0] * shape[1] * shape[2]

    def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        embeds, grad, delta = (torch.randn(shape, device=device) for _ in range(3))
        return embeds, 1e-3 * grad, NOISE_STD * delta, torch.zeros(1, dtype=torch.int64, device=device)

    def options_of(ascent: tuple[str, str, str]) -> dict[str, Any]:
        norm, normalize, level = ascent
        return {"step_size": STEP_SIZE, "epsilon": EPSILON, "norm": norm, "normalize": normalize, "level": level}

    def build(ascent: tuple[str, str, str]) -> dict[str, Call]:
        (embeds, grad, delta, _), options = inputs(), options_of(ascent)
        calls: dict[str, Call] = {"eager": lambda: eager_projected_ascent(embeds, grad, delta, **options)}
        if compiled and ascent in COMPILED_ASCENTS:
            quick = torch.compile(eager_projected_ascent, dynamic=False)
            calls["compile"] = lambda: quick(embeds, grad, delta, **options)
        for backend in own_backends("projected_ascent", device, embeds.dtype):
            calls[backend] = lambda backend=backend: projected_ascent(embeds, grad, delta, **options, backend=backend)
        return calls

    def build_pair(ascent: tuple[str, str, str]) -> dict[str, Call]:
        (embeds, grad, _, seed), options = inputs(), options_of(ascent)
        calls: dict[str, Call] = {"eager": lambda: eager_noise_and_ascent(embeds, grad, NOISE_STD, **options)}
        if compiled:
            quick = torch.compile(eager_noise_and_ascent, dynamic=False)
            calls["compile"] = lambda: quick(embeds, grad, NOISE_STD, **options)
        for backend in own_backends("projected_ascent", device, embeds.dtype):
            calls[backend] = lambda backend=backend: (
                noise_init(embeds, std=NOISE_STD, seed=seed, backend=backend),
                projected_ascent(embeds, grad, seed=seed, std=NOISE_STD, **options, backend=backend),
            )
        return calls

    for ascent in ascents:
        label = f"{shape} fp32 {' '.join(ascent)}"
        yield Case("projected_ascent", label, 4 * size, lambda ascent=ascent: build(ascent))
        if ascent in COMPILED_ASCENTS:
            yield Case("noise and ascent", label, 5 * size, lambda ascent=ascent: build_pair(ascent))


def all_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """What ``python -m benchmarks.ops`` measures."""
    on_cuda = device.type == "cuda"
    logits = (*LOGITS, *LOGITS_ON_CUDA) if on_cuda and not quick else LOGITS
    yield from divergence_cases(logits, device)
    for shape in (EMBEDDINGS, EMBEDDINGS_ON_CUDA) if on_cuda and not quick else (EMBEDDINGS,):
        yield from noise_cases(shape, device)
        yield from ascent_cases(shape, device, QUICK_ASCENTS if quick else every_ascent())
