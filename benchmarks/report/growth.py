"""Time and peak memory of the ops as one size doubles."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .files import ResultFile
from .markup import Finding, Html, NotRun, joined, panels, table, tag
from .numbers import bytes_tick, count_tick, mebibytes, ms, seconds_tick, span, times
from .svg import Plot, Point, Series, draw, legend_of, log_scale, look

TITLE = "Growth"
INTRO = (
    "One size doubles, the others stay. Both axes are logarithmic: a straight line that rises as the grid does is "
    "proportional to the size. Memory is what a call holds besides its inputs, at its peak."
)
EAGER, OURS = "eager", "ours"
Row = Mapping[str, Any]


def curves(file: ResultFile) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by op, axis and the sizes that stay, in order of the size that grows."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in file.results:
        groups.setdefault((row["op"], row["axis"], tuple(row["fixed"].items())), []).append(row)
    return {key: sorted(rows, key=lambda row: row["size"]) for key, rows in groups.items()}


def _held(fixed: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(f"{name} = {size}" for name, size in fixed)


def _time(row: Row) -> float | None:
    return None if row["timing"] is None else row["timing"]["median_s"]


def _memory(row: Row) -> float | None:
    return row["peak_bytes"]


def _by_size(rows: Sequence[Row], figure: Callable[[Row], float | None], provider: str) -> dict[float, float]:
    return {r["size"]: value for r in rows if r["provider"] == provider and (value := figure(r)) is not None}


def findings(file: ResultFile) -> list[Finding]:
    """Eager's time and memory as multiples of ours, at the largest size that both reached."""
    found = []
    for (op, axis, fixed), rows in curves(file).items():
        words, worst = [], None
        for what, figure in (("time", _time), ("memory", _memory)):
            eager, ours = (_by_size(rows, figure, name) for name in (EAGER, OURS))
            shared = sorted(set(eager) & set(ours))
            if shared and ours[shared[-1]] > 0:
                factor = eager[shared[-1]] / ours[shared[-1]]
                worst = factor if worst is None else min(worst, factor)
                words.append(f"{times(factor)} ours in {what}")
        if words:
            place = f"{op} at {axis} = {shared[-1]} ({_held(fixed)})" if shared else op
            found.append(Finding(f"{place}: eager takes {', '.join(words)}", "loss" if worst < 1 else "win"))
    failed = [f"{r['provider']} on {r['op']} at {r['axis']} = {r['size']}: {r['not_run']}"
              for r in file.results if r["not_run"] is not None]  # fmt: skip
    return [*found, *(Finding(f"not run: {words}") for words in failed)]


def plots(file: ResultFile) -> list[Plot]:
    """Two plots a curve: time and memory."""
    made = []
    for (op, axis, fixed), rows in curves(file).items():
        x = log_scale([row["size"] for row in rows], count_tick, base=2, most=4)
        for what, figure, form in (("time", _time, seconds_tick), ("memory", _memory, bytes_tick)):
            if all(figure(row) is None for row in rows):
                continue
            series = []
            for name in dict.fromkeys(row["provider"] for row in rows):
                own = [row for row in rows if row["provider"] == name and figure(row) is not None]
                points = [_point(row, figure, form) for row in own]
                series.append(Series(name, points, *look(name), line=True))
            made.append(
                Plot(
                    f"{op}: {what} over {axis}",
                    f"{what} of {op} as {axis} doubles, with {_held(fixed)}; both axes are logarithmic.",
                    x,
                    log_scale([v for row in rows if (v := figure(row)) is not None], form, base=_base(form), most=5),
                    axis,
                    "median time" if what == "time" else "peak memory",
                    series,
                    failed=[
                        (row["size"], look(row["provider"])[0], f"{row['provider']} not run: {row['not_run']}")
                        for row in rows
                        if row["not_run"] is not None
                    ],
                    note=_held(fixed),
                )
            )
    return made


def _base(form: Callable[[float], str]) -> int:
    return 4 if form is bytes_tick else 10


def _point(row: Row, figure: Callable[[Row], float | None], form: Callable[[float], str]) -> Point:
    value, timing = figure(row), row["timing"]
    words = f"{row['provider']}, {row['axis']} = {row['size']}: {form(value)}"
    if figure is _time:
        return Point(row["size"], value, words, timing["p20_s"], timing["p80_s"])
    return Point(row["size"], value, words)


def body(file: ResultFile) -> Html:
    drawn = plots(file)
    tables = [
        joined((tag("h4", f"{op} over {axis}: {_held(fixed)}"), _table(axis, rows)))
        for (op, axis, fixed), rows in curves(file).items()
    ]
    folded = tag("details", tag("summary", "All figures as tables"), *tables)
    return joined((legend_of(drawn), panels(*(draw(plot) for plot in drawn)), folded))


def _table(axis: str, rows: Sequence[Row]) -> Html:
    lines: list[Any] = []
    for row in rows:
        first = (f"{axis} = {row['size']}", row["provider"])
        if row["not_run"] is not None:
            lines.append(NotRun(first, row["not_run"]))
        else:
            lines.append((*first, ms(row["timing"]), span(row["timing"]), mebibytes(row["peak_bytes"])))
    return table((axis, "provider", "median ms", "p20–p80", "peak MiB"), lines, text_columns=2)


def compared(file: ResultFile) -> dict[str, str]:
    """Ours at every size, in time and memory."""
    lines = {}
    for row in file.results:
        if row["provider"] == OURS:
            fixed = _held(tuple(row["fixed"].items()))
            words = f"not run: {row['not_run']}" if row["not_run"] is not None else (
                f"{ms(row['timing'])} ms, {mebibytes(row['peak_bytes'])} MiB"
            )  # fmt: skip
            lines[f"{row['op']}, {row['axis']} = {row['size']} ({fixed})"] = words
    return lines
