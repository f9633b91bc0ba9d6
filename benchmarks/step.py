"""Time of a whole training step: standard, adversarial in plain PyTorch, adversarial with this library.

    python -m benchmarks.step [--shape NAME ...] [--mode eager|compiled|both] [--providers NAME ...] [--rounds 15]
                              [--threads 2] [--device cpu|cuda] [--json PATH]

Shapes are those of benchmarks/shapes.py (default: all that are meant for the device), providers those of
benchmarks/step_providers.py (default: all), which say what they do. ``compiled`` compiles the model with
``model.compile()``, hooks already installed; losses, divergences and the ascent stay as they are.

    of standard   median over that of the standard step of the same shape and mode
    bound         counted operations of the exact step over those of the standard one (benchmarks/flops.py), on a
                  fraction of the batch where the provider is; with positions="all", at all of them
    of bound      of standard over bound: 1.00x would be a step that loses nothing
    peak          MiB of tensors that the step holds at its peak, gradients included, besides weights; of a captured
                  one, what the capture takes
    model, ours   shares of the time in the model's own passes and in this library's ops (benchmarks/step_profile.py)
    launches      kernels, or graphs of them, that the host launches (CUDA)

A provider that cannot take a step has a line that says why.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .flops import FRACTION, forward_of
from .machine import machine_of, write_results
from .machine_options import add_machine_options
from .shapes import SHAPES, Shape, labelled_rows, shapes_for, shapes_named
from .step_profile import StepProfile, profile_step
from .step_providers import (
    AT_ALL_POSITIONS,
    CAPTURED,
    ON_A_FRACTION,
    PROVIDERS,
    STANDARD,
    Bench,
    NotRunError,
    Step,
)
from .table import Table, milliseconds, ratio
from .timing import Call, Timing, measure, peak_memory, times_as_long

MODES = ("eager", "compiled")
COMPILING = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True, "skip_nnmodule_hook_guards": False}
"""A step calls a model in several ways, and past torch.compile's ordinary limit it would run eagerly without a word.
Code is shared by all models of a class, and without guards on hooks one with hooks may get that of one without."""

FIRST_CALLS = {"eager": 1, "compiled": 3}
"""Untimed calls of a step before the others run: the second one still compiles."""

Row = dict[str, Any]


def _bound(bench: Bench, provider: str) -> float:
    if provider == STANDARD:
        return 1.0
    shape = bench.shape
    labelled = labelled_rows(shape, bench.batch)
    forward = forward_of(bench.model.config, shape.task, shape.batch, shape.length)
    if provider == ON_A_FRACTION:
        return forward.bound(labelled, fraction=FRACTION)
    if provider == AT_ALL_POSITIONS:
        return forward.bound(labelled, compared=int(bench.batch["attention_mask"].sum()))
    return forward.bound(labelled)


@dataclass(frozen=True)
class Ready:
    """A step that has run: its call, its model, and on CUDA the bytes that making it took at their peak."""

    call: Call
    model: nn.Module
    made_in_bytes: int | None


def _make(provider: str, bench: Bench) -> Step | NotRunError:
    """The step before anything is compiled, or why there is none."""
    try:
        return PROVIDERS[provider](bench)
    except NotRunError as reason:
        return reason


def _first_calls(step: Step | NotRunError, bench: Bench, calls: int) -> Ready | NotRunError:
    """The step, run as often as it takes to be compiled, or why it cannot run."""
    if isinstance(step, NotRunError):
        return step
    on_cuda, made_in_bytes = bench.device.type == "cuda", None
    try:
        if on_cuda:
            torch.cuda.synchronize(bench.device)
            held = torch.cuda.memory_allocated(bench.device)
            torch.cuda.reset_peak_memory_stats(bench.device)
        call = step.start()
        if on_cuda:
            made_in_bytes = torch.cuda.max_memory_allocated(bench.device) - held
        for _ in range(calls):
            call()
        if on_cuda:
            torch.cuda.synchronize(bench.device)
    except NotRunError as reason:
        return reason
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = f"torch.compile: {str(error).strip().splitlines()[0]}"
    else:
        return Ready(call, step.model, made_in_bytes)
    bench.model.zero_grad(set_to_none=True)
    if on_cuda:
        torch.cuda.empty_cache()
    return NotRunError(reason)


def _profiled(provider: str, ready: Ready, bench: Bench) -> StepProfile:
    # without old gradients: the peak would be less by those that the call frees
    bench.model.zero_grad(set_to_none=True)
    found = profile_step(ready.call, ready.model, bench.device, shares=provider != CAPTURED)
    if bench.device.type == "cpu":
        return found
    if provider == CAPTURED:
        return replace(found, peak_bytes=ready.made_in_bytes)
    bench.model.zero_grad(set_to_none=True)
    return replace(found, peak_bytes=peak_memory(ready.call, bench.device))


def _row(shape: Shape, mode: str, provider: str, not_run: str | None = None, **measured: Any) -> Row:
    row = {
        "shape": shape.name,
        "task": shape.task,
        "model": shape.model,
        "batch": shape.batch,
        "length": shape.length,
        "provider": provider,
        "mode": mode,
    }
    names = ("timing", "of_standard", "flop_bound", "of_bound", "peak_bytes", "model_share", "kernel_share", "launches")
    return {**row, **{name: measured.get(name) for name in names}, "not_run": not_run}


def measure_shape(shape: Shape, mode: str, providers: Sequence[str], device: torch.device, rounds: int) -> list[Row]:
    """One row a provider, in their order.

    Args:
        shape: of the registry, or another.
        mode: one of :data:`MODES`.
        providers: names in :data:`benchmarks.step_providers.PROVIDERS`.
        device: where.
        rounds: samples of each provider.
    """
    if device.type not in shape.devices:
        reason = f"the shape is meant for {' and '.join(shape.devices)}"
        return [_row(shape, mode, provider, reason) for provider in providers]
    bench = Bench(shape, shape.make_model(device), shape.make_batch(device))
    steps = {provider: _make(provider, bench) for provider in providers}
    if mode == "compiled":
        torch._dynamo.reset()
        for model in {step.model for step in steps.values() if isinstance(step, Step)}:
            model.compile()
    with torch._dynamo.config.patch(**COMPILING):
        first_calls = FIRST_CALLS[mode]
        first = {provider: _first_calls(step, bench, first_calls) for provider, step in steps.items()}
        ready = {provider: found for provider, found in first.items() if isinstance(found, Ready)}
        calls = {provider: found.call for provider, found in ready.items()}
        timings = measure(calls, device=device, rounds=rounds, warmup=int(device.type == "cuda")) if calls else {}
        profiles = {provider: _profiled(provider, found, bench) for provider, found in ready.items()}
    return [
        _measured(bench, mode, provider, timings, profiles[provider])
        if provider in ready
        else _row(shape, mode, provider, str(first[provider]))
        for provider in providers
    ]


def _measured(bench: Bench, mode: str, provider: str, timings: dict[str, Timing], found: StepProfile) -> Row:
    overhead, bound = times_as_long(timings, provider, STANDARD), _bound(bench, provider)
    return _row(
        bench.shape,
        mode,
        provider,
        timing=timings[provider].to_dict(),
        of_standard=overhead,
        flop_bound=bound,
        of_bound=None if overhead is None else overhead / bound,
        peak_bytes=found.peak_bytes,
        model_share=found.model_share,
        kernel_share=found.library_share,
        launches=found.launches,
    )


def _table() -> Table:
    return Table(
        [
            ("mode", 8), ("step", 16), ("median ms", 9), ("p20", 8), ("p80", 8), ("of standard", 11), ("bound", 6),
            ("of bound", 8), ("peak MiB", 8), ("model", 6), ("ours", 6), ("launches", 8),
        ],
        text_columns=2,
    )  # fmt: skip


def _print(table: Table, row: Row) -> None:
    if row["not_run"] is not None:
        table.row(row["mode"], row["provider"], f"not run: {row['not_run']}", *[""] * 9)
        return
    timing, shares = row["timing"], (row["model_share"], row["kernel_share"])
    table.row(
        row["mode"],
        row["provider"],
        *(milliseconds(timing[name]) for name in ("median_s", "p20_s", "p80_s")),
        *(ratio(row[name]) for name in ("of_standard", "flop_bound", "of_bound")),
        f"{row['peak_bytes'] / 2**20:.0f}",
        *("-" if share is None else f"{100 * share:.1f} %" for share in shares),
        "-" if row["launches"] is None else str(row["launches"]),
    )


def run(shapes: Sequence[Shape], options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Measure and print shape by shape."""
    for shape in shapes:
        print(f"\n{shape.name}: {shape.model}, {shape.task}, batch {shape.batch} x {shape.length}, {shape.weights()}")
        table = _table()
        for mode in MODES if options.mode == "both" else (options.mode,):
            for row in measure_shape(shape, mode, options.providers, device, options.rounds):
                _print(table, row)
                yield row
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[Shape]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", help=f"of {', '.join(SHAPES)} (those meant for the device)")
    parser.add_argument("--mode", choices=(*MODES, "both"), default="eager")
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), help=f"of {'; '.join(PROVIDERS)} (all)")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each step")
    add_machine_options(parser)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.providers if name not in PROVIDERS]
    if unknown:
        parser.error(f"--providers: expected some of {'; '.join(PROVIDERS)}, got {'; '.join(unknown)}")
    if options.rounds < 1:
        parser.error(f"--rounds: expected a number > 0, got {options.rounds}")
    try:
        return options, shapes_named(options.shape) if options.shape else shapes_for(torch.device(options.device))
    except ValueError as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    options, shapes = _options(arguments)
    device, known = machine_of(options)
    results: list[Row] = []
    try:
        results.extend(run(shapes, options, device))
    finally:
        # what was measured is kept where a later shape fails
        if options.json and results:
            write_results(options.json, "step", known, rounds=options.rounds, results=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
