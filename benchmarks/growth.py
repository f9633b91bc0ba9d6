"""How time and peak memory of the ops grow with the sizes of the problem.

    python -m benchmarks.growth [--axis N V H S] [--rounds 5] [--threads 2] [--device cpu|cuda] [--json PATH]

    symmetric_kl          N rows, V classes                forward and backward of logits (N, V)
    linear_symmetric_kl   N rows, V classes, H hidden      forward and backward of hidden states (N, H), weight (V, H)
    noise and ascent      S tokens, H hidden               both calls of a step with K = 1 on embeddings (B, S, H)

One size doubles while the others stay. Providers: eager PyTorch and ours, on the backend that the op takes by default;
they are those of benchmarks/cases.py and benchmarks/linear_head.py. Peak memory is what a call holds besides its
inputs, gradients included. A provider that finds no memory at some size is in the results with that reason.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from alum_kernels.adversarial.out_of_memory import refused_memory
from alum_kernels.ops.dispatch import choose

from .cases import COMPILED_ASCENTS, DTYPES, Case, ascent_cases, divergence_cases
from .linear_head import Operands, providers
from .machine import machine_of, write_results
from .machine_options import add_machine_options
from .table import Table, milliseconds, ratio
from .timing import Call, measure, peak_memory, times_as_long

AXES = ("N", "V", "H", "S")
EAGER, OURS = "eager", "ours"
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Growth:
    """One op along one axis: the sizes it takes, and those that stay."""

    op: str
    axis: str
    sizes: tuple[int, ...]
    fixed: dict[str, int]


def doubling(first: int, last: int) -> tuple[int, ...]:
    """Sizes from ``first`` to ``last``, each twice the one before.

    Example:
        >>> doubling(64, 512)
        (64, 128, 256, 512)
    """
    sizes = [first]
    while 2 * sizes[-1] <= last:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)


ON_CPU = (
    Growth("symmetric_kl", "N", doubling(16, 512), {"V": 30522}),
    Growth("symmetric_kl", "V", doubling(1024, 65536), {"N": 128}),
    Growth("linear_symmetric_kl", "N", doubling(64, 1024), {"V": 8192, "H": 256}),
    Growth("linear_symmetric_kl", "V", doubling(2048, 32768), {"N": 256, "H": 256}),
    Growth("linear_symmetric_kl", "H", doubling(64, 1024), {"N": 256, "V": 8192}),
    Growth("noise and ascent", "S", doubling(16, 512), {"B": 16, "H": 768}),
    Growth("noise and ascent", "H", doubling(64, 2048), {"B": 16, "S": 128}),
)
ON_CUDA = (
    Growth("symmetric_kl", "N", doubling(256, 16384), {"V": 30522}),
    Growth("symmetric_kl", "V", doubling(1024, 262144), {"N": 4096}),
    Growth("linear_symmetric_kl", "N", doubling(512, 16384), {"V": 30522, "H": 768}),
    Growth("linear_symmetric_kl", "V", doubling(4096, 262144), {"N": 4096, "H": 1024}),
    Growth("linear_symmetric_kl", "H", doubling(256, 8192), {"N": 4096, "V": 32768}),
    Growth("noise and ascent", "S", doubling(64, 8192), {"B": 32, "H": 1024}),
    Growth("noise and ascent", "H", doubling(256, 16384), {"B": 32, "S": 512}),
)


def _only(cases: Iterator[Case], op: str) -> Case:
    (case,) = (case for case in cases if case.op == op)
    return case


def _linear_case(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    """Bytes moved: hidden states and weight read once, their gradients written once."""
    rows, hidden, vocabulary = sizes["N"], sizes["H"], sizes["V"]
    size = 2 * (2 * rows * hidden + vocabulary * hidden) * dtype.itemsize

    def build() -> dict[str, Call]:
        operands = Operands.drawn(rows, hidden, vocabulary, 1e-2, 0.5 * hidden**-0.5, dtype, device)
        calls = providers(operands)
        return {EAGER: calls["eager"], choose("linear_symmetric_kl", None, operands.hidden): calls["fused"]}

    return Case("linear_symmetric_kl", str(dict(sizes)), size, build)


def case_of(op: str, sizes: Sizes, storage: str, device: torch.device) -> Case:
    """The case of an op at given sizes, by the letters of the axes."""
    if op == "symmetric_kl":
        return _only(divergence_cases(((sizes["N"], sizes["V"], storage),), device, compiled=False), op)
    if op == "linear_symmetric_kl":
        return _linear_case(sizes, DTYPES[storage], device)
    shape = (sizes["B"], sizes["S"], sizes["H"])
    return _only(ascent_cases(shape, device, COMPILED_ASCENTS[:1], compiled=False), op)


def default_backend(op: str, storage: str, device: torch.device) -> str:
    """The backend that the op takes where none is named."""
    chosen = "projected_ascent" if op == "noise and ascent" else op
    return choose(chosen, None, torch.empty(0, dtype=DTYPES[storage], device=device))


def measure_size(
    build: Callable[[], dict[str, Call]], backend: str, device: torch.device, rounds: int
) -> dict[str, dict[str, Any]]:
    """Peaks of eager and ours at one size, and their interleaved timings; the reason where there is none.

    Raises:
        RuntimeError: a provider fails for another reason than memory.
    """
    missing = {"timing": None, "peak_bytes": None}
    try:
        built = build()
    except RuntimeError as error:
        if not refused_memory(error):
            raise
        return {name: {**missing, "not_run": "out of memory: inputs"} for name in (EAGER, OURS)}
    calls = {EAGER: built[EAGER]}
    if backend in built:
        calls[OURS] = built[backend]
    found: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        found[name] = _peak(call, device)
    fitting = {name: call for name, call in calls.items() if found[name]["not_run"] is None}
    try:
        timings = measure(fitting, device=device, rounds=rounds, warmup=1) if fitting else {}
    except RuntimeError as error:
        if not refused_memory(error):
            raise
        timings = {}
        for name in fitting:
            found[name]["not_run"] = "out of memory while both were timed"
    for name, timing in timings.items():
        found[name]["timing"] = timing
    if OURS not in calls:
        found[OURS] = {**missing, "not_run": f"the default backend here is {backend}, which has no kernels"}
    return found


def _peak(call: Call, device: torch.device) -> dict[str, Any]:
    """Peak of a call that also compiles and warms it, or that there is no memory for it."""
    try:
        call()
        return {"timing": None, "peak_bytes": peak_memory(call, device), "not_run": None}
    except RuntimeError as error:
        if not refused_memory(error):
            raise
        reason = "out of memory"
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {"timing": None, "peak_bytes": None, "not_run": reason}


def run(growth: Growth, storage: str, device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """Measure and print one op along one axis, a row of results a size and provider."""
    held = ", ".join(f"{name} {size}" for name, size in growth.fixed.items())
    kept = "fp32" if growth.op == "noise and ascent" else storage
    backend = default_backend(growth.op, kept, device)
    print(f"\n{growth.op} over {growth.axis}; {held}, {kept}; ours is {backend}")
    table = Table(
        [(growth.axis, 7), ("eager ms", 13), ("ours ms", 13), ("eager/ours", 10), ("eager MiB", 13), ("ours MiB", 13)],
        text_columns=0,
    )
    for size in growth.sizes:
        case = case_of(growth.op, {**growth.fixed, growth.axis: size}, kept, device)
        found = measure_size(case.build, backend, device, rounds)
        timings = {name: part["timing"] for name, part in found.items() if part["timing"] is not None}
        table.row(
            str(size),
            *(milliseconds(timings[n].median) if n in timings else found[n]["not_run"][:13] for n in (EAGER, OURS)),
            ratio(times_as_long(timings, EAGER, OURS)),
            *(
                "-" if found[n]["peak_bytes"] is None else f"{found[n]['peak_bytes'] / 2**20:.2f}"
                for n in (EAGER, OURS)
            ),
        )
        for name in (EAGER, OURS):
            timing = found[name]["timing"]
            yield {
                "op": growth.op,
                "axis": growth.axis,
                "size": size,
                "fixed": growth.fixed,
                "dtype": kept,
                "provider": name,
                "backend": backend if name == OURS else None,
                **found[name],
                "timing": None if timing is None else timing.to_dict(),
                "bytes_moved": case.bytes_moved,
            }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", nargs="+", choices=AXES, default=list(AXES), help="sizes that grow (all)")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each provider at each size")
    add_machine_options(parser)
    options = parser.parse_args()
    device, known = machine_of(options)
    on_cuda = device.type == "cuda"
    results = [
        row
        for growth in (ON_CUDA if on_cuda else ON_CPU)
        if growth.axis in options.axis
        for row in run(growth, "bf16" if on_cuda else "fp32", device, options.rounds)
    ]
    if options.json:
        write_results(options.json, "growth", known, rounds=options.rounds, results=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
