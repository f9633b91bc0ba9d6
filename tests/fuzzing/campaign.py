"""Cases, one after another: drawn, run on every backend that can serve them, judged, counted."""

import functools
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from alum_kernels.ops.dispatch import unavailable
from fuzzing import divergences, linear, tokens
from fuzzing.draws import Draw, Held, described, same_bits
from fuzzing.judgement import Judgement
from fuzzing.short_blocks import short_blocks

FAMILIES = (divergences, linear, tokens)
OPS = tuple(op for family in FAMILIES for op in family.OPS)
PYTORCH = ("squared_error", "linear_cross_entropy")
"""Ops without a choice of backends: plain PyTorch, which is counted as the reference."""
SHORT = 1100
"""Up to this size every other case of Triton is streamed in short blocks."""
SLOW = ("triton", "cuda")
"""Backends that Python runs, or a thread at a time: small cases only."""


@dataclass(frozen=True)
class Case:
    """One call, drawn from (seed, number); prints as what repeats it."""

    seed: int
    number: int
    op: str
    small: bool
    tensors: dict[str, Held | None] = field(repr=False)
    options: dict[str, Any] = field(repr=False)

    def __str__(self) -> str:
        return f"--case {self.seed}:{self.number}   # {self.op}({described(self.tensors, self.options)})"

    @property
    def largest(self) -> int:
        """The largest dimension of a tensor."""
        return max(max(held.tensor.shape, default=1) for held in self.tensors.values() if held is not None)

    @property
    def family(self) -> ModuleType:
        return next(family for family in FAMILIES if self.op in family.OPS)


def draw_case(seed: int, number: int, ops: Sequence[str] = OPS) -> Case | None:
    """Case ``number`` of ``seed``, or None where its op is not among ``ops``; the same whatever ``ops`` are."""
    draw = Draw(seed, number)
    family = draw.choice(FAMILIES, (5, 2, 3))
    op = draw.choice(family.OPS, family.WEIGHTS)
    return Case(seed, number, op, draw.small, *family.draw(draw, op)) if op in ops else None


def obstacle(case: Case, backend: str) -> str | None:
    """Why ``backend`` does not run the case, or None."""
    if case.op in PYTORCH:
        return None if backend == "reference" else "it has one implementation"
    if backend in SLOW and not case.small:
        return "too large for it"
    names = {"symmetric_kl_grad": "symmetric_kl", "linear_symmetric_kl_grad": "linear_symmetric_kl"}
    divergence = case.options.get("divergence", case.op if case.family is divergences else None)
    first = next(one for one in case.tensors.values() if one is not None and one.tensor.dtype.is_floating_point)
    real = "native" if backend == "cuda" else backend
    return unavailable(names.get(case.op, case.op), real, torch.device("cpu"), first.tensor.dtype, divergence)


def complaints(case: Case, backend: str, emulation: Callable[[], AbstractContextManager] | None = None) -> Judgement:
    """Run a case on a backend and judge it; twice, but for most cases of the reference, which has no threads."""
    judge = Judgement()
    place = emulation() if backend == "cuda" else nullcontext()
    if backend == "triton" and case.number % 2 and case.largest <= SHORT:
        place = short_blocks()
    run = functools.partial(case.family.run, case.op, case.tensors, case.options)
    real = "native" if backend == "cuda" else backend
    try:
        with place:
            results = run(real)
            again = run(real) if backend != "reference" or case.number % 5 == 0 else results
        case.family.check(case.op, case.tensors, case.options, results, judge)
    except Exception:  # whatever is raised is what the case found
        judge.complaints.append(traceback.format_exc(limit=-1).strip().replace("\n", "\n      "))
        return judge
    for name, held in case.tensors.items():
        judge.require(held is None or held.unchanged(), f"{name}: the call wrote into it")
    for name, tensor in results.items():
        judge.require(same_bits(tensor, again[name]), f"{name}: the second call gives other bits")
    return judge


@dataclass
class Tally:
    """What the cases of one op on one backend showed."""

    cases: int = 0
    failed: int = 0
    worst: float = 0.0


@dataclass
class Report:
    """What a campaign showed."""

    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    cases: int = 0

    def add(self, case: Case, backend: str, judge: Judgement) -> None:
        tally = self.tallies.setdefault((case.op, backend), Tally())
        tally.cases += 1
        tally.worst = max(tally.worst, judge.worst)
        if judge.complaints:
            tally.failed += 1
            lines = "".join(f"\n    {text}" for text in judge.complaints)
            self.failures.append(f"{backend}: {case}{lines}")

    def table(self) -> str:
        """Cases, failures and the largest share of a tolerance, by op and backend."""
        backends = sorted({backend for _, backend in self.tallies})
        lines = ["op".ljust(26) + "".join(backend.rjust(24) for backend in backends)]
        for op in (op for op in OPS if any((op, backend) in self.tallies for backend in backends)):
            cells = []
            for backend in backends:
                tally = self.tallies.get((op, backend))
                failed = f"{tally.failed} failed" if tally and tally.failed else "ok"
                cells.append("-" if tally is None else f"{tally.cases} {failed} {min(tally.worst, 999):.2f}")
            lines.append(op.ljust(26) + "".join(cell.rjust(24) for cell in cells))
        return "\n".join(lines)


def campaign(
    seed: int,
    numbers: Sequence[int],
    *,
    ops: Sequence[str] = OPS,
    backends: Sequence[str] = ("reference", "native"),
    emulation: Callable[[], AbstractContextManager] | None = None,
    seconds: float = float("inf"),
    progress: Callable[[Report], None] | None = None,
) -> Report:
    """Run cases ``numbers`` of ``seed`` on every one of ``backends`` that can, until they or the time run out.

    Fresh memory must be poisoned (``torch.use_deterministic_algorithms``), so that an element that no kernel writes
    does not pass.
    """
    report, end = Report(), time.monotonic() + seconds
    for number in numbers:
        if time.monotonic() > end:
            break
        case = draw_case(seed, number, ops)
        if case is None:
            continue
        report.cases += 1
        for backend in backends:
            if obstacle(case, backend) is None:
                report.add(case, backend, complaints(case, backend, emulation))
        if progress is not None:
            progress(report)
    return report
