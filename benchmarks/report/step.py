"""Whole training steps: what an adversarial one costs, in standard steps of the same mode."""

from collections.abc import Mapping, Sequence
from typing import Any

from .files import ResultFile
from .markup import Bar, Finding, Html, NotRun, bars, joined, notice, panels, table, tag
from .numbers import DASH, mebibytes, ms, number, percent, span, times
from .svg import look

TITLE = "Whole steps"
INTRO = (
    "Forward and backward passes of a whole step, without the optimizer, as multiples of the standard step of the same "
    "shape and mode (dashed line at 1). The dark mark on a bar is the least that the counted floating-point "
    "operations allow; the thin line reaches from the 20th to the 80th percentile."
)
STANDARD = "standard"
Row = Mapping[str, Any]


def shapes(file: ResultFile) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by shape, task, model, batch and length."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in file.results:
        groups.setdefault((row["shape"], row["task"], row["model"], row["batch"], row["length"]), []).append(row)
    return groups


def _name(key: tuple[Any, ...]) -> str:
    shape, task, model, batch, length = key
    parts = [str(part) for part in (task, model, shape) if part not in (None, "")]
    sizes = f"{batch} x {length}"
    return ", ".join(parts if any(sizes in part for part in parts) else [*parts, f"batch {sizes}"])


def _standard(rows: Sequence[Row], mode: str) -> float | None:
    for row in rows:
        if row["provider"] == STANDARD and row["mode"] == mode and row["timing"] is not None:
            return row["timing"]["median_s"]
    return None


def overhead(row: Row, rows: Sequence[Row]) -> float | None:
    """The file's figure; None where no standard step of the mode was measured."""
    return row["of_standard"] if _standard(rows, row["mode"]) is not None else None


def findings(file: ResultFile) -> list[Finding]:
    """Ours beside the others of the same shape and mode, whichever is faster."""
    found = []
    for key, rows in shapes(file).items():
        for mode in dict.fromkeys(row["mode"] for row in rows):
            timed = {r["provider"]: r for r in rows if r["mode"] == mode and r["timing"] is not None}
            for name in (name for name in timed if name == "ours"):
                ours = timed[name]["timing"]["median_s"]
                cost = overhead(timed[name], rows)
                for other in (other for other in timed if other in ("naive", "smart-pytorch")):
                    factor = timed[other]["timing"]["median_s"] / ours
                    verb = "as long as ours" if factor >= 1 else "as long as ours: ours is slower"
                    found.append(
                        Finding(
                            f"{_name(key)}, {mode}: ours costs {times(cost)} a standard step; {other} takes "
                            f"{times(factor)} {verb}",
                            "win" if factor >= 1 else "loss",
                        )
                    )
    return found


def body(file: ResultFile) -> Html:
    parts = []
    if file.older:
        parts.append(
            notice(
                "This file has the older form of the benchmark: steps in eager mode only, without the bound of the "
                "floating-point operations, shares of model and kernels, and launches. What it holds is shown."
            )
        )
    for key, rows in shapes(file).items():
        drawn = [
            bars(f"{_name(key)}, {mode}", made, reference=1.0)
            for mode in dict.fromkeys(row["mode"] for row in rows)
            if (made := _bars([row for row in rows if row["mode"] == mode], rows))
        ]
        parts += [tag("h4", _name(key)), panels(*drawn), _table(rows, file.older)]
    return joined(parts)


def _bars(rows: Sequence[Row], all_rows: Sequence[Row]) -> list[Bar]:
    made = []
    for row in rows:
        if row["not_run"] is not None:
            made.append(Bar(row["provider"], None, f"not run: {row['not_run']}", "neutral"))
            continue
        cost, base = overhead(row, all_rows), _standard(all_rows, row["mode"])
        if cost is None:
            continue
        bound = row["flop_bound"]
        words = times(cost) + (f" (bound {times(bound)})" if bound is not None else "")
        timing = row["timing"]
        ends = (None, None) if timing is None else (timing["p20_s"] / base, timing["p80_s"] / base)
        made.append(Bar(row["provider"], cost, words, look(row["provider"])[0], *ends, bound=bound))
    return made


def _table(rows: Sequence[Row], older: bool) -> Html:
    head = ["step", "mode", "median ms", "p20–p80", "of standard"]
    if not older:
        head += ["FLOP bound", "of bound", "model", "kernels", "launches", "peak MiB"]
    lines: list[Any] = []
    for row in rows:
        if row["not_run"] is not None:
            lines.append(NotRun((row["provider"], row["mode"]), row["not_run"]))
            continue
        cells = [row["provider"], row["mode"], ms(row["timing"]), span(row["timing"]), times(overhead(row, rows))]
        if not older:
            cells += [
                times(row["flop_bound"]),
                times(row["of_bound"]),
                percent(row["model_share"]),
                percent(row["kernel_share"]),
                DASH if row["launches"] is None else number(row["launches"]),
                mebibytes(row["peak_bytes"]),
            ]
        lines.append(cells)
    return table(head, lines, text_columns=2)


def compared(file: ResultFile) -> dict[str, str]:
    """Time and cost of every step."""
    lines = {}
    for key, rows in shapes(file).items():
        for row in rows:
            words = f"not run: {row['not_run']}" if row["not_run"] is not None else (
                f"{ms(row['timing'])} ms, {times(overhead(row, rows))}"
            )  # fmt: skip
            lines[f"{_name(key)}: {row['provider']}, {row['mode']}"] = words
    return lines
