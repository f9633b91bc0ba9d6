"""A small call of every CUDA kernel, for compute-sanitizer: odd sizes, masks, strided rows, every path by size.

    compute-sanitizer --tool memcheck python -m benchmarks.every_kernel [--backend native triton]

Results are compared with the reference, so that a run that reads nothing wrong but computes nonsense fails as well.
"""

import argparse
import itertools
import sys

import torch

import alum_kernels
from alum_kernels.backends.reference import symmetric_kl as reference
from alum_kernels.ops.dispatch import implementation
from alum_kernels.ops.projected_ascent import LEVELS, NORMALIZE, NORMS

COLUMNS = (1, 3, 64, 65, 130, 2056, 30522)
"""A class; short rows; their end; odd and even long ones; rows that are summed without terms; a vocabulary."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def close(name: str, ours: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(
        ours.double(), expected.double(), rtol=tolerance, atol=tolerance * 1e-2, msg=lambda text: f"{name}: {text}"
    )


def token_kernels(backend: str, device: torch.device) -> int:
    """Noise and ascent at a hidden size that no vector divides."""
    calls = 0
    for dtype in DTYPES:
        embeds = torch.randn(3, 5, 37, device=device).to(dtype)
        grad = torch.randn(3, 5, 37, device=device).to(dtype)
        mask = torch.ones(3, 5, dtype=torch.int64, device=device)
        mask[1, 3:] = 0
        seed = torch.tensor([7], device=device)
        for distribution in ("normal", "uniform"):
            options = {"std": 1e-2, "seed": seed, "mask": mask, "distribution": distribution, "return_delta": True}
            ours = alum_kernels.noise_init(embeds, backend=backend, **options)
            expected = alum_kernels.noise_init(embeds, backend="reference", **options)
            for side, other in zip(ours, expected, strict=True):
                close(f"noise_init {distribution}", side, other, dtype)
            calls += 1
        for norm, normalize, level in itertools.product(NORMS, NORMALIZE, LEVELS):
            options = {
                "std": 1e-2,
                "seed": seed,
                "step_size": 1e-2,
                "epsilon": 1e-2,
                "norm": norm,
                "normalize": normalize,
                "level": level,
                "mask": mask,
                "return_delta": True,
                "return_stats": True,
            }
            perturbed, delta, statistics = alum_kernels.projected_ascent(embeds, grad, backend=backend, **options)
            expected = alum_kernels.projected_ascent(embeds, grad, backend="reference", **options)
            close(f"projected_ascent {norm} {normalize} {level}", perturbed, expected[0], dtype)
            close(f"projected_ascent {norm} {normalize} {level} delta", delta, expected[1], torch.float32)
            close("projected_ascent squared length", statistics[..., 0], expected[2][..., 0], torch.float32)
            calls += 1
    return calls


def divergence_kernels(backend: str, device: torch.device) -> int:
    """Loss, gradient, and both at once, on contiguous rows and on rows cut out of a wider tensor."""
    calls = 0
    for dtype, columns, divergence in itertools.product(DTYPES, COLUMNS, ("symmetric_kl", "kl")):
        function = getattr(alum_kernels, divergence)
        wide = torch.randn(2, 5, columns + 3, device=device)
        moved = wide + 0.1 * torch.randn_like(wide)
        for cut in (slice(0, columns), slice(1, columns + 1)):
            b = wide[..., cut].to(dtype) if cut.start == 0 else wide.to(dtype)[..., cut]
            a = moved[..., cut].to(dtype) if cut.start == 0 else moved.to(dtype)[..., cut]
            mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 1, 1]], device=device)
            results = {}
            for served in (backend, "reference"):
                left, right = a.detach().requires_grad_(), b.detach().requires_grad_()
                loss = function(left, right, mask=mask, backend=served)
                loss.backward()
                total, grad = alum_kernels.symmetric_kl_grad(
                    a, b, mask=mask, divergence=divergence, gradient="detach_clean", backend=served
                )
                both = alum_kernels.symmetric_kl_grad(
                    a, b, mask=mask, divergence=divergence, clean_gradient=True, backend=served
                )
                results[served] = (loss.detach(), left.grad, right.grad, total, grad, *both)
            for ours, expected in zip(results[backend], results["reference"], strict=True):
                close(f"{divergence} {columns} {dtype}", ours, expected, dtype)
            calls += 4
    return calls


def linear_kernels(backend: str, device: torch.device) -> int:
    """Rows of the linear divergence: both forms, every gradient dtype, in place where that can be."""
    calls, rows = 0, implementation("linear_symmetric_kl", backend).divergence_rows
    for columns, divergence, differences in itertools.product(COLUMNS, ("symmetric_kl", "kl"), (True, False)):
        b, bias = torch.randn(1, 5, columns, device=device), torch.randn(columns, device=device)
        first = 0.1 * torch.randn_like(b)
        if not differences:
            first = b + first
        weight = torch.tensor([[0.5, 0.5, 0.0, 1.0, 2.0]], device=device)
        wide = [x[0].double() for x in ((b + first if differences else first), b)]
        wide = [x + bias.double() for x in wide]
        options = {"divergence": divergence, "inv_temperature": 1.0}
        expected, _ = reference.loss(*wide, weight[0].double(), **options)
        da, db = reference.gradient(*wide, weight[0].double(), gradient="full", **options)
        for dtype in DTYPES if device.type == "cuda" or backend == "triton" else DTYPES[:1]:
            in_place = dtype == torch.float32
            loss = torch.empty_like(weight)
            inputs = [first.clone(), b.clone()]
            grads = inputs if in_place else [torch.empty_like(x, dtype=dtype) for x in inputs]
            rows(*inputs, bias, weight, loss, *grads, differences, divergence, "full", 1.0)
            for ours, theirs in zip((loss, *grads), (expected, da, da + db), strict=True):
                close(f"linear {divergence} {columns} {dtype}", ours[0], theirs, dtype)
            calls += 1
    return calls + linear_heads(backend, device)


def linear_heads(backend: str, device: torch.device) -> int:
    """The op around those rows: its products, chunk by chunk, with masked rows and a bias."""
    calls = 0
    for dtype, soft_cap in itertools.product(DTYPES, (None, 5.0)):
        given = [torch.randn(*shape, device=device).to(dtype) for shape in ((7, 24), (7, 24), (310, 24), (310,))]
        mask = torch.tensor([1, 1, 0, 1, 1, 0, 1], device=device)
        results = {}
        for served in (backend, "reference"):
            leaves = [x.clone().requires_grad_() for x in given]
            loss = alum_kernels.linear_symmetric_kl(
                *leaves, mask=mask, soft_cap=soft_cap, chunk_bytes=30000, backend=served
            )
            loss.backward()
            results[served] = (loss.detach(), *(leaf.grad for leaf in leaves))
        for ours, expected in zip(results[backend], results["reference"], strict=True):
            close(f"linear_symmetric_kl {dtype}", ours, expected, dtype)
        calls += 1
    return calls


def main() -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("--backend", nargs="*", default=["native"], choices=["native", "triton"])
    parser.add_argument("--device", default="cuda")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    torch.manual_seed(0)
    for backend in chosen.backend:
        calls = token_kernels(backend, device) + divergence_kernels(backend, device) + linear_kernels(backend, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        print(f"{backend} on {device}: {calls} calls agree with the reference")
    return 0


if __name__ == "__main__":
    sys.exit(main())
