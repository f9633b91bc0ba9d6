"""The ops beside eager PyTorch, torch.compile and Liger-Kernel, and how near they come to the memory's bandwidth."""

from collections.abc import Mapping
from typing import Any

from .files import ResultFile
from .markup import Finding, Html, NotRun, against, escaped, joined, panels, table
from .numbers import bytes_tick, mebibytes, ms, percent, span, times
from .svg import Plot, Point, Series, draw, legend_of, log_scale, look

TITLE = "Ops"
INTRO = (
    "Each op on one shape, forward and backward where it has both. Times are medians in milliseconds with the 20th to "
    "80th percentile; a ratio of 3.00× says that the other provider takes three times as long as this library's "
    "kernels."
)
OURS, OTHERS = ("native", "triton"), ("eager", "compile", "liger")


def share_of_copy(row: Mapping[str, Any], provider: str) -> float:
    """Bytes a second of a provider, by the least bytes that the op moves, over those of a large copy."""
    return row["bytes_moved"] / row["timings"][provider]["median_s"] / row["copy_bytes_per_second"]


def factor(row: Mapping[str, Any], other: str, ours: str) -> float | None:
    """How many times as long the other takes; None where one of them was not measured."""
    timings = row["timings"]
    return timings[other]["median_s"] / timings[ours]["median_s"] if other in timings and ours in timings else None


def providers(file: ResultFile) -> list[str]:
    names = dict.fromkeys(name for row in file.results for name in (*row["timings"], *row["out_of_memory"]))
    return sorted(names, key=lambda name: ((*OTHERS, *OURS).index(name) if name in (*OTHERS, *OURS) else -1, name))


def findings(file: ResultFile) -> list[Finding]:
    """How often each backend is faster and slower, and where it is slower."""
    found = []
    for ours in (name for name in providers(file) if name in OURS):
        for other in (name for name in providers(file) if name in OTHERS):
            factors = [(f, row) for row in file.results if (f := factor(row, other, ours)) is not None]
            if not factors:
                continue
            slower = [(f, row) for f, row in factors if f < 1]
            low, high = min(f for f, _ in factors), max(f for f, _ in factors)
            text = (
                f"{ours} against {other}: faster in {len(factors) - len(slower)} of {len(factors)} cases, "
                f"{other} takes {times(low)} to {times(high)} as long"
            )
            found.append(Finding(text, "win" if not slower else "plain"))
            if slower:
                named = "; ".join(f"{row['op']} {row['case']} ({times(f)})" for f, row in sorted(slower, key=_first))
                found.append(Finding(f"{ours} is slower than {other} in {len(slower)}: {named}", "loss"))
    missing = [f"{name} on {row['op']} {row['case']}" for row in file.results for name in row["out_of_memory"]]
    if missing:
        found.append(Finding(f"out of memory: {'; '.join(missing)}"))
    return found


def _first(pair: tuple[float, Any]) -> float:
    return pair[0]


def body(file: ResultFile) -> Html:
    plots = rooflines(file)
    return joined((legend_of(plots), panels(*(draw(plot) for plot in plots)), _table(file)))


def rooflines(file: ResultFile) -> list[Plot]:
    """A plot an op: share of the copy bandwidth against bytes moved, one mark a case and provider."""
    rows, names = file.results, providers(file)
    if not rows:
        return []
    shares = [share_of_copy(row, name) for row in rows for name in row["timings"]]
    x = log_scale([row["bytes_moved"] for row in rows], bytes_tick, base=4, most=4)
    y = log_scale([*shares, 1.0], percent)
    plots = []
    for op in dict.fromkeys(row["op"] for row in rows):
        series = [
            Series(
                name,
                [
                    Point(
                        row["bytes_moved"],
                        share_of_copy(row, name),
                        f"{name}, {row['case']}: {percent(share_of_copy(row, name))} of a copy",
                    )
                    for row in rows
                    if row["op"] == op and name in row["timings"]
                ],
                *look(name),
            )
            for name in names
        ]
        copy = next(row["copy_bytes_per_second"] for row in rows if row["op"] == op)
        plots.append(
            Plot(
                f"{op}: share of copy bandwidth",
                f"Achieved bytes a second as a share of a large copy's {copy / 1e9:.1f} GB/s, against the least bytes "
                "that the op moves; both axes are logarithmic.",
                x, y, "bytes moved", "share of copy", series,
                rules=((1.0, "", "strong"), (0.75, "", "")),
                note=f"Lines: 100 % and 75 % of {copy / 1e9:.1f} GB/s. Above: inputs that lie in cache.",
            )
        )  # fmt: skip
    return plots


def _table(file: ResultFile) -> Html:
    names = providers(file)
    own, others = [n for n in names if n in OURS], [n for n in names if n in OTHERS]
    with_memory = any(row["peak_bytes"] for row in file.results)
    pairs = [(other, ours) for ours in own for other in others]
    head = ["op", "case", *(f"{name} ms" for name in names), *(f"{other} / {ours}" for other, ours in pairs)]
    head += [f"{name} of copy" for name in own]
    if with_memory:
        head += [f"{name} MiB" for name in names]
    rows: list[Any] = []
    for row in file.results:
        if not row["timings"]:
            rows.append(NotRun((row["op"], row["case"]), "out of memory: " + ", ".join(row["out_of_memory"])))
            continue
        timings, peaks = row["timings"], row["peak_bytes"] or {}
        cells: list[object] = [row["op"], row["case"]]
        cells += [_timed(timings.get(name), name in row["out_of_memory"]) for name in names]
        cells += [against(factor(row, *pair), times(factor(row, *pair))) for pair in pairs]
        cells += [percent(share_of_copy(row, name)) if name in timings else percent(None) for name in own]
        if with_memory:
            cells += [mebibytes(peaks.get(name)) for name in names]
        rows.append(cells)
    return table(head, rows, text_columns=2)


def _timed(timing: dict[str, Any] | None, failed: bool) -> Html:
    if timing is None:
        return escaped("out of memory" if failed else "–")
    return joined((ms(timing), Html(f' <small class="muted">({escaped(span(timing))})</small>')))


def compared(file: ResultFile) -> dict[str, str]:
    """Time of the fastest backend, and eager's as a multiple of it."""
    lines = {}
    for row in file.results:
        own = [name for name in OURS if name in row["timings"]]
        if own:
            best = min(own, key=lambda name: row["timings"][name]["median_s"])
            eager = times(factor(row, "eager", best))
            lines[f"{row['op']} {row['case']}"] = f"{best} {ms(row['timings'][best])} ms, eager {eager}"
    return lines
