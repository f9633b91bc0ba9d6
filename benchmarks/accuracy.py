"""Accuracy of the divergence against float64, beside eager PyTorch: the bounds that every backend must reach.

    python -m benchmarks.accuracy [--backends reference native triton] [--rows N] [--quick] [--device cpu|cuda]
                                  [--dtypes fp32 bf16 fp16] [--json PATH]

Inputs: clean logits b = 3 randn and 8 randn, each also with one class raised by 24; adversarial logits b + perturbation
randn; both rounded to the dtype. The truth is the reference backend in float64 on those rounded inputs. Figures:

    value     largest relative error of a row
    whole     ||g - t|| / ||t|| over all rows; g, t the gradients to one side; the worse side
    median    the same row by row, the median row

The gradient of 16-bit logits is rounded once by necessity: what is shown is the error beyond it,
(||g - t|| - ||round(t) - t||) / ||t||. Left out of ratios: rows whose two sides are equal, and rows whose truth (value,
or largest gradient element) lies below 2^-126, where fp32 has no full precision. Eager is two-sided F.kl_div in fp32.

Triton on CPU tensors runs in the interpreter, slowly: small vocabularies and fewer rows unless ``--rows`` or
``--classes`` say otherwise. The exit status is 1 if a backend exceeds a bound.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .machine_options import add_machine_options
from .table import Table

CLASSES = (2, 3, 64, 65, 1000, 30522, 50257, 128256)
PERTURBATIONS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 50.0)
CLEAN = {"3 randn": (3.0, 0.0), "3 randn, one +24": (3.0, 24.0), "8 randn": (8.0, 0.0), "8 randn, one +24": (8.0, 24.0)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INTERPRETED_CLASSES = (2, 3, 64, 65)
INTERPRETED_ROWS = 64
QUICK_CLASSES = (3, 65, 30522)
QUICK_PERTURBATIONS = (1e-5, 1e-2, 1.0, 50.0)
SMALLEST_NORMAL = 2.0**-126
METRICS = ("value", "whole", "median")

Divergence = Callable[[Tensor, Tensor], Tensor]
"""Logits (N, V) of both sides to the divergence of each row, differentiable."""


@dataclass(frozen=True)
class Cell:
    """Errors of one provider on one kind of input; a figure is None where every row is left out of it."""

    provider: str
    dtype: str
    classes: int
    perturbation: float
    clean: str
    rows: int
    value: float | None
    whole: float | None
    median: float | None

    def bounds(self) -> dict[str, float]:
        """The bounds of the library's backends; none of them holds for eager."""
        far = self.perturbation >= 50
        value = 4e-6 if far or self.classes <= 64 else 1e-6
        gradient = 1e-4 if far else 1e-5
        return {"value": value, "whole": gradient, "median": gradient}

    def exceeded(self) -> list[str]:
        """Figures beyond their bound, NaN and infinity included."""
        if self.provider == "eager":
            return []
        figures = {name: getattr(self, name) for name in METRICS}
        return [
            name for name, bound in self.bounds().items() if figures[name] is not None and not figures[name] <= bound
        ]


def default_rows(classes: int) -> int:
    """65,536 rows of the smallest heads, 8 of the largest vocabularies."""
    return 65536 if classes <= 3 else 2048 if classes <= 65 else 256 if classes <= 1000 else 8


def inputs(
    rows: int, classes: int, perturbation: float, clean: str, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Adversarial and clean logits in ``dtype``, the same on every machine; rows that became equal are left out."""
    generator = torch.Generator().manual_seed(1)
    scale, raised = CLEAN[clean]
    b = scale * torch.randn(rows, classes, generator=generator)
    b[torch.arange(rows), torch.randint(classes, (rows,), generator=generator)] += raised
    a = (b + perturbation * torch.randn(rows, classes, generator=generator)).to(dtype)
    b = b.to(dtype)
    differs = (a != b).any(-1)
    return a[differs].to(device), b[differs].to(device)


def rows_and_gradients(divergence: Divergence, a: Tensor, b: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Value of each row in float64 and gradients of their sum to both sides, in the dtype they come in."""
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    rows = divergence(a, b)
    grad_a, grad_b = torch.autograd.grad(rows.sum(), (a, b))
    return rows.detach().double(), (grad_a, grad_b)


def _error_beyond_rounding(gradient: Tensor, truth: Tensor, dims: tuple[int, ...]) -> Tensor:
    """(||g - t|| - ||round(t) - t||) / ||t||, the second term for 16-bit gradients only."""
    error = (gradient.double() - truth).pow(2).sum(dims).sqrt()
    if gradient.dtype != torch.float32:
        rounding = (truth.to(gradient.dtype).double() - truth).pow(2).sum(dims).sqrt()
        error = (error - rounding).clamp(min=0)
    return error / truth.pow(2).sum(dims).sqrt()


def compare(
    found: tuple[Tensor, tuple[Tensor, Tensor]], truth: tuple[Tensor, tuple[Tensor, Tensor]]
) -> dict[str, float | None]:
    """The three figures of one provider."""
    normal = truth[0] >= SMALLEST_NORMAL
    value = ((found[0] - truth[0]).abs() / truth[0])[normal]
    whole, median = [], []
    for gradient, exact in zip(found[1], truth[1], strict=True):
        normal_rows = exact.abs().amax(-1) >= SMALLEST_NORMAL
        if normal_rows.any():
            gradient, exact = gradient[normal_rows], exact[normal_rows]
            whole.append(_error_beyond_rounding(gradient, exact, (0, 1)).item())
            median.append(_error_beyond_rounding(gradient, exact, (1,)).median().item())
    return {
        "value": _worst(value.tolist()),
        "whole": _worst(whole),
        "median": _worst(median),
    }


def _worst(figures: list[float]) -> float | None:
    """The largest, NaN above all; None of nothing."""
    return max(figures, key=lambda x: math.inf if math.isnan(x) else x) if figures else None


def providers(backends: list[str]) -> dict[str, Divergence]:
    """Eager PyTorch, and the library on each of the backends."""
    from alum_kernels import symmetric_kl

    from .eager_kl import eager_symmetric_kl_rows

    found: dict[str, Divergence] = {"eager": eager_symmetric_kl_rows}
    for backend in backends:
        found[backend] = lambda a, b, backend=backend: symmetric_kl(a, b, reduction="none", backend=backend)
    return found


def measure_cell(
    serving: dict[str, Divergence], rows: int, classes: int, perturbation: float, storage: str, device: torch.device
) -> Iterator[Cell]:
    """Every provider on every kind of clean logits."""
    from alum_kernels import symmetric_kl

    for clean in CLEAN:
        a, b = inputs(rows, classes, perturbation, clean, DTYPES[storage], device)
        kind = (storage, classes, perturbation, clean, len(a))
        if len(a) == 0:
            for name in serving:
                yield Cell(name, *kind, None, None, None)
            continue
        truth = rows_and_gradients(
            lambda x, y: symmetric_kl(x, y, reduction="none", backend="reference"), a.double(), b.double()
        )
        for name, divergence in serving.items():
            yield Cell(name, *kind, **compare(rows_and_gradients(divergence, a, b), truth))


def _scientific(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.0e}".replace("e-0", "e-").replace("e+0", "e+")


def run(options: argparse.Namespace, backends: list[str], device: torch.device) -> Iterator[Cell]:
    """Measure and print line by line, the worst over the kinds of clean logits."""
    names = list(providers(backends))
    interpreted = "triton" in backends and device.type == "cpu"
    if interpreted:
        print(
            f"triton runs in the interpreter: V <= {max(INTERPRETED_CLASSES)}, {INTERPRETED_ROWS} rows, "
            "unless --classes or --rows are given; its accuracy on a GPU is not measured here"
        )
    print("'*' marks what exceeds its bound; '-' was not measured, or every row is left out; rows are of one kind of b")
    short = {"reference": "ref", "median": "med"}
    columns = [(f"{short.get(metric, metric)}:{short.get(name, name)}", 9) for metric in METRICS for name in names]
    table = Table([("dtype", 5), ("V", 6), ("perturb.", 8), ("rows", 6), *columns], text_columns=1)
    for storage in options.dtypes:
        for classes in options.classes or (QUICK_CLASSES if options.quick else CLASSES):
            for perturbation in QUICK_PERTURBATIONS if options.quick else PERTURBATIONS:
                cells = []
                rows = options.rows or default_rows(classes) // (8 if options.quick and classes <= 1000 else 1)
                fast = [name for name in backends if not (interpreted and name == "triton")]
                cells += measure_cell(providers(fast), rows, classes, perturbation, storage, device)
                if interpreted and (options.classes or classes in INTERPRETED_CLASSES):
                    slow = {"triton": providers(["triton"])["triton"]}
                    few = options.rows or INTERPRETED_ROWS
                    cells += measure_cell(slow, few, classes, perturbation, storage, device)
                table.row(storage, str(classes), f"{perturbation:g}", str(rows), *_figures(cells, names))
                yield from cells


def _figures(cells: list[Cell], names: list[str]) -> Iterator[str]:
    for metric in METRICS:
        for name in names:
            mine = [cell for cell in cells if cell.provider == name]
            worst = _worst([figure for cell in mine if (figure := getattr(cell, metric)) is not None])
            yield _scientific(worst) + ("*" if any(metric in cell.exceeded() for cell in mine) else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", choices=("reference", "native", "triton"), help="all that can serve")
    parser.add_argument("--rows", type=int, help="rows of every kind of logits")
    parser.add_argument("--classes", type=int, nargs="+", help="vocabulary sizes V")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--quick", action="store_true", help="fewer rows, vocabularies and perturbations")
    add_machine_options(parser)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined, so before the library is imported
    from alum_kernels.ops.dispatch import BACKENDS, unavailable

    from .machine import describe, facts, write_results

    device = torch.device(options.device)
    reasons = {name: unavailable("symmetric_kl", name, device, torch.float32) for name in BACKENDS}
    for name in options.backends or ():
        if reasons[name] is not None:
            parser.error(f"--backends: {name} cannot serve on {device}: {reasons[name]}")
    backends = options.backends or [name for name in BACKENDS if reasons[name] is None]
    known = facts(device)
    print(describe(known))
    for name, reason in reasons.items():
        if reason is not None:
            print(f"{name} is not measured: {reason}")
    cells = list(run(options, backends, device))
    beyond = [(cell, cell.exceeded()) for cell in cells if cell.exceeded()]
    for cell, names in beyond:
        figures = ", ".join(f"{name} {getattr(cell, name):.2e} > {cell.bounds()[name]:.0e}" for name in names)
        print(
            f"exceeded: {cell.provider} {cell.dtype} V={cell.classes} {cell.perturbation:g} b={cell.clean}: {figures}"
        )
    print(f"{len(cells)} cells, {len(beyond)} exceed a bound")
    if options.json:
        written = [{**asdict(cell), "bounds": cell.bounds(), "exceeded": cell.exceeded()} for cell in cells]
        write_results(options.json, "accuracy", known, results=written)
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
