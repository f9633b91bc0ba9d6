"""The divergence of a linear head: accuracy against float64, memory and time, beside what people write.

    python -m benchmarks.linear_head [--what accuracy memory time] [--rows 2048 --vocabulary 30522 --hidden 384]
                                     [--dtype fp32|bf16] [--rounds 15] [--threads 2] [--device cpu|cuda]
                                     [--json PATH]

Hidden states are standard normal, those of the adversary differ by ``perturbation`` standard deviations, the weight
has a standard deviation of 0.02 (0.5 / sqrt(H) for time and memory). Gradients are those of both hidden states and of
the weight; errors are relative L2 errors (of the value: relative), against float64 of the same, rounded, inputs.

    fp32 inputs   fused          linear_symmetric_kl
                  two logits     symmetric_kl of two fp32 logits: the row kernel is exact, the logits are rounded
    bf16 inputs   differences    fp32 products of widened inputs: what the CPU does
                  sides          bf16 products with fp32 output, bf16 gradients between products: what CUDA does
                  bf16 logits    symmetric_kl of two bf16 logits
                  bf16 G_a, G_b  dW as the sum of two products of bf16 logit gradients

    time          fused, its three products alone, eager (two logits, two-sided F.kl_div with log_target),
                  torch.compile of that, and on CUDA Liger-Kernel's fused linear JSD, whose second side has no gradient
    memory        bytes of tensors held at the peak of forward and backward, gradients included, inputs not
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alum_kernels import linear_symmetric_kl, symmetric_kl
from alum_kernels.backends.linear_chunks import (
    LinearDivergence,
    LinearOptions,
    Wanted,
    plan_of,
    rows_in_chunk,
    wide_product,
)
from alum_kernels.ops.dispatch import choose, implementation

from .eager_kl import eager_symmetric_kl
from .machine import machine_of, write_results
from .machine_options import add_machine_options
from .table import Table, milliseconds, ratio
from .timing import Call, measure, peak_memory, times_as_long

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SECTIONS = ("accuracy", "memory", "time")
PERTURBATIONS = {"fp32": (1e-5, 1e-3, 1e-1), "bf16": (0.1, 0.03, 0.01)}
ACCURACY_ROWS, ACCURACY_HIDDEN, ACCURACY_VOCABULARY = 64, 768, 32000


@dataclass(frozen=True)
class Operands:
    """Hidden states (N, H) of both sides and the weight (V, H) of a head."""

    adv_hidden: Tensor
    hidden: Tensor
    weight: Tensor

    @classmethod
    def drawn(
        cls,
        rows: int,
        hidden_size: int,
        vocabulary: int,
        perturbation: float,
        spread: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Operands":
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(rows, hidden_size, generator=generator)
        adv_hidden = hidden + perturbation * torch.randn(rows, hidden_size, generator=generator)
        weight = spread * torch.randn(vocabulary, hidden_size, generator=generator)
        return cls(*(tensor.to(device, dtype) for tensor in (adv_hidden, hidden, weight)))

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        return [x.detach().to(dtype or x.dtype).requires_grad_() for x in (self.adv_hidden, self.hidden, self.weight)]


Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
"""Value, and the gradients of both hidden states and of the weight."""


def differentiated(function: Callable[..., Tensor], leaves: list[Tensor]) -> Gradients:
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def of_plan(operands: Operands, plan: str) -> Gradients:
    """The fused divergence before its gradients are rounded."""
    backend = choose("linear_symmetric_kl", None, operands.hidden)
    result = LinearDivergence(
        implementation("linear_symmetric_kl", backend),
        operands.adv_hidden,
        operands.hidden,
        operands.weight,
        None,
        None,
        None,
        LinearOptions("symmetric_kl", "full"),
        Wanted(adv_hidden=True, hidden=True, weight=True),
        plan,
    ).run()
    return result.rows.sum(), result.adv_hidden, result.hidden, result.weight


def of_bf16_logit_gradients(operands: Operands) -> Gradients:
    """Exact logits, whose gradients are rounded to bf16 before the products: dW is the sum of two."""
    adv_hidden, hidden, weight = (x.double() for x in (operands.adv_hidden, operands.hidden, operands.weight))
    logits = [(x @ weight.T).requires_grad_() for x in (adv_hidden, hidden)]
    value = symmetric_kl(*logits, reduction="sum", backend="reference")
    grad_a, grad_b = (g.bfloat16().double() for g in torch.autograd.grad(value, logits))
    return value.detach(), grad_a @ weight, grad_b @ weight, grad_a.T @ adv_hidden + grad_b.T @ hidden


def through_logits(adv_hidden: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return symmetric_kl(adv_hidden @ weight.T, hidden @ weight.T, reduction="sum")


def fused_sum(adv_hidden: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return linear_symmetric_kl(adv_hidden, hidden, weight, reduction="sum")


def reference_sum(adv_hidden: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return linear_symmetric_kl(adv_hidden, hidden, weight, reduction="sum", backend="reference")


def accuracy(device: torch.device, dtype: str) -> list[dict[str, Any]]:
    """Print and return the errors of each way, at each perturbation."""
    print(f"\naccuracy, {dtype}: N {ACCURACY_ROWS}, H {ACCURACY_HIDDEN}, V {ACCURACY_VOCABULARY}")
    table = Table(
        [("perturbation", 12), ("way", 14), ("value", 9), ("d h_adv", 9), ("d h", 9), ("dW", 9)], text_columns=2
    )
    results = []
    for perturbation in PERTURBATIONS[dtype]:
        operands = Operands.drawn(
            ACCURACY_ROWS, ACCURACY_HIDDEN, ACCURACY_VOCABULARY, perturbation, 0.02, DTYPES[dtype], device
        )
        exact = differentiated(reference_sum, operands.leaves(torch.float64))
        ways: dict[str, Callable[[], Gradients]] = {}
        if dtype == "fp32":
            ways["fused"] = lambda operands=operands: differentiated(fused_sum, operands.leaves())
            ways["two logits"] = lambda operands=operands: differentiated(through_logits, operands.leaves())
        else:
            for plan in ("differences", "sides"):
                ways[plan] = lambda operands=operands, plan=plan: of_plan(operands, plan)
            ways["bf16 logits"] = lambda operands=operands: differentiated(through_logits, operands.leaves())
            ways["bf16 G_a, G_b"] = lambda operands=operands: of_bf16_logit_gradients(operands)
        for name, way in ways.items():
            errors = [float((got.double() - want).norm() / want.norm()) for got, want in zip(way(), exact, strict=True)]
            table.row(f"{perturbation:g}", name, *(f"{error:.1e}" for error in errors))
            results.append({"dtype": dtype, "perturbation": perturbation, "way": name, "errors": errors})
    return results


def eager(adv_hidden: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return eager_symmetric_kl(adv_hidden @ weight.T, hidden @ weight.T)


def liger(operands: Operands) -> Call | None:
    """Liger-Kernel's fused linear JSD on the same operands, where it is installed; its second side has no gradient."""
    try:
        from liger_kernel.transformers import LigerFusedLinearJSD
    except ImportError:
        return None
    divergence = LigerFusedLinearJSD()
    adv_hidden, hidden, weight = operands.leaves()

    def call() -> object:
        value = divergence(adv_hidden, weight, hidden.detach(), weight.detach())
        return torch.autograd.grad(value, (adv_hidden, weight))

    return call


def products_alone(operands: Operands) -> Call:
    """The three stacked products over chunks as the fused divergence takes them, and nothing else."""
    hidden, adv_hidden, weight = operands.hidden, operands.adv_hidden, operands.weight
    rows, columns = hidden.shape[0], weight.shape[0]
    dtype = torch.float32 if plan_of(hidden) == "differences" else hidden.dtype
    weight, options = weight.to(dtype), LinearOptions("symmetric_kl", "full")
    size = rows_in_chunk(rows, columns, options, hidden.device, dtype.itemsize)
    total = torch.empty(weight.shape, dtype=torch.float32, device=hidden.device)

    def call() -> object:
        for begin in range(0, rows, size):
            x = torch.cat([hidden[begin : begin + size], adv_hidden[begin : begin + size]]).to(dtype)
            gradients = wide_product(x, weight.T).to(dtype)
            through = wide_product(gradients, weight)
            wide_product(gradients.T, x, out=total, accumulate=begin > 0)
        return through, total

    return call


def providers(operands: Operands) -> dict[str, Call]:
    """Forward and backward of each way, the mean over the rows."""
    leaves = operands.leaves()
    compiled = torch.compile(eager, dynamic=False)
    calls = {
        "fused": lambda: torch.autograd.grad(linear_symmetric_kl(*leaves), leaves),
        "products": products_alone(operands),
        "eager": lambda: torch.autograd.grad(eager(*leaves), leaves),
        "compile": lambda: torch.autograd.grad(compiled(*leaves), leaves),
    }
    if operands.hidden.is_cuda and (other := liger(operands)) is not None:
        calls["liger"] = other
    return calls


def time_and_memory(
    options: argparse.Namespace, device: torch.device, dtype: str, sections: list[str]
) -> list[dict[str, Any]]:
    """Print and return the time and the peak of each way at one size."""
    shape = (options.rows, options.hidden, options.vocabulary)
    operands = Operands.drawn(*shape, 1e-2, 0.5 * options.hidden**-0.5, DTYPES[dtype], device)
    calls = providers(operands)
    print(f"\n{dtype}: N {options.rows}, H {options.hidden}, V {options.vocabulary}; forward and backward")
    peaks = {}
    if "memory" in sections:
        calls["compile"]()
        peaks = {name: peak_memory(call, device) for name, call in calls.items() if name != "products"}
    timings = measure(calls, device=device, rounds=options.rounds, warmup=1) if "time" in sections else {}
    table = Table(
        [("way", 10), ("median ms", 10), ("p20", 9), ("p80", 9), ("of eager", 9), ("of products", 11), ("peak MiB", 9),
         ("of eager's", 10)],
        text_columns=1,
    )  # fmt: skip
    results = []
    for name in calls:
        timing, peak = timings.get(name), peaks.get(name)
        table.row(
            name,
            *(milliseconds(timing.median), milliseconds(timing.percentile(20)), milliseconds(timing.percentile(80)),
              ratio(times_as_long(timings, name, "eager")), ratio(times_as_long(timings, name, "products")))
            if timing else ("", "", "", "", ""),
            f"{peak / 2**20:.0f}" if peak is not None else "",
            f"{peak / peaks['eager']:.1%}" if peak is not None else "",
        )  # fmt: skip
        results.append(
            {
                "dtype": dtype,
                "way": name,
                "rows": options.rows,
                "hidden": options.hidden,
                "vocabulary": options.vocabulary,
                "timing": timing.to_dict() if timing else None,
                "peak_bytes": peak,
            }
        )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="fp32 and bf16; time on the CPU: fp32")
    parser.add_argument("--rounds", type=int, default=15)
    add_machine_options(parser)
    options = parser.parse_args()
    device, known = machine_of(options)
    results: dict[str, Any] = {}
    if "accuracy" in options.what:
        results["accuracy"] = [r for dtype in options.dtype or DTYPES for r in accuracy(device, dtype)]
    if "time" in options.what or "memory" in options.what:
        timed = options.dtype or (["bf16"] if device.type == "cuda" else ["fp32"])
        results["cost"] = [r for dtype in timed for r in time_and_memory(options, device, dtype, options.what)]
    if options.json:
        write_results(options.json, "linear-head", known, rounds=options.rounds, results=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
