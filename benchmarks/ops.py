"""Speed of the ops beside eager PyTorch and torch.compile.

    python -m benchmarks.ops [--quick] [--threads 2] [--device cpu|cuda] [--json PATH]

Each line is one op on one shape: median milliseconds with 20th and 80th percentile of each provider (who they are is
said in benchmarks/cases.py), how many times as long the others take as the library's kernels, bytes moved a second by
the library's default backend and its share of the bandwidth of a large copy measured in the same run. On CUDA also the
peak of memory held besides the inputs.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch

from alum_kernels.adversarial.out_of_memory import refused_memory

from .cases import Case, all_cases
from .machine import machine_of, write_results
from .machine_options import add_machine_options
from .table import Table, milliseconds, ratio
from .timing import Call, Timing, copy_bandwidth, measure, peak_memory, times_as_long

OURS = ("native", "triton")
OTHERS = ("eager", "compile", "liger")


def fits(call: Call) -> bool:
    """Whether a call finds the memory it needs on a CUDA device."""
    try:
        call()
    except RuntimeError as error:
        if not refused_memory(error):
            raise
        torch.cuda.empty_cache()
        return False
    return True


def measure_case(case: Case, device: torch.device, rounds: int, bandwidth: float) -> dict[str, Any]:
    """Everything about one case, as JSON has it; the ``timings`` themselves under that name."""
    torch._dynamo.reset()
    calls = case.build()
    too_large = [name for name, call in calls.items() if not fits(call)] if device.type == "cuda" else []
    calls = {name: call for name, call in calls.items() if name not in too_large}
    timings = measure(calls, device=device, rounds=rounds)
    own = [name for name in OURS if name in timings]
    memory = {name: peak_memory(call, device) for name, call in calls.items()} if device.type == "cuda" else None
    return {
        "op": case.op,
        "case": case.label,
        "timings": timings,
        "ratios": {
            f"{other}/{ours}": times_as_long(timings, other, ours)
            for ours in own
            for other in OTHERS
            if other in timings
        },
        "bytes_moved": case.bytes_moved,
        "bytes_per_second": {name: case.bytes_moved / timings[name].median for name in own},
        "share_of_copy": {name: case.bytes_moved / timings[name].median / bandwidth for name in own},
        "peak_bytes": memory,
        "out_of_memory": too_large,
    }


def _span(timing: Timing | None, failed: bool) -> str:
    if timing is None:
        return "out of memory" if failed else "-"
    low, high = milliseconds(timing.percentile(20)), milliseconds(timing.percentile(80))
    return f"{milliseconds(timing.median)} ({low}-{high})"


def _columns(device: torch.device) -> tuple[list[str], list[str]]:
    """Providers, and the ratios between them, that the table of this device shows."""
    if device.type == "cuda":
        ratios = [f"{other}/{ours}" for ours in OURS for other in OTHERS]
        return [*OTHERS, *OURS], ratios
    return ["eager", "compile", "native"], ["eager/native", "compile/native"]


def run(device: torch.device, quick: bool, rounds: int, only: str | None) -> Iterator[dict[str, Any]]:
    """Measure and print case by case."""
    bandwidth = copy_bandwidth(device)
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s (read and write counted); milliseconds: median (p20-p80)")
    providers, ratios = _columns(device)
    memory = [(f"{name} MiB", 11) for name in providers] if device.type == "cuda" else []
    table = Table(
        [
            ("op", 17), ("case", 47), *((name, 22) for name in providers), *((name, 14) for name in ratios),
            ("GB/s", 6), ("of copy", 7), *memory,
        ],
        text_columns=2,
    )  # fmt: skip
    for case in all_cases(device, quick):
        if only is not None and only not in f"{case.op} {case.label}":
            continue
        found = measure_case(case, device, rounds, bandwidth)
        timings, first = found["timings"], next(iter(found["bytes_per_second"]), None)
        peaks = found["peak_bytes"] or {}
        table.row(
            case.op,
            case.label,
            *(_span(timings.get(name), name in found["out_of_memory"]) for name in providers),
            *(ratio(found["ratios"].get(name)) for name in ratios),
            "-" if first is None else f"{found['bytes_per_second'][first] / 1e9:.1f}",
            "-" if first is None else f"{100 * found['share_of_copy'][first]:.0f} %",
            *(f"{peaks[name] / 2**20:.0f}" if name in peaks else "-" for name in providers[: len(memory)]),
        )
        found["timings"] = {name: timing.to_dict() for name, timing in timings.items()}
        yield {**found, "copy_bytes_per_second": bandwidth}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, fewer ascents, no large shapes")
    parser.add_argument("--rounds", type=int, help="samples of each provider (15, quick 7)")
    parser.add_argument("--only", help="cases that contain this text, such as 'noise_init' or '30522) bf16'")
    add_machine_options(parser)
    options = parser.parse_args()
    device, known = machine_of(options)
    rounds = options.rounds or (7 if options.quick else 15)
    results = list(run(device, options.quick, rounds, options.only))
    if not results:
        parser.error(f"--only: no case contains {options.only!r}")
    if options.json:
        write_results(options.json, "ops", known, rounds=rounds, results=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
