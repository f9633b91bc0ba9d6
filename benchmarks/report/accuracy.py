"""Errors of the divergence and its gradients against float64, and the bounds they must keep."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .files import ResultFile
from .markup import Finding, Html, joined, panels, table, tag
from .numbers import error
from .svg import Plot, Point, Series, draw, legend_of, log_scale, look

TITLE = "Accuracy"
INTRO = (
    "Relative errors against float64: of the value, the worst row; of the gradient, over all rows (whole) and of the "
    "median row. Each point is the worst over the vocabularies and kinds of clean logits. Eager is held to no bound."
)
METRICS = {"value": "error of the value", "whole": "error of the gradient"}
EAGER = "eager"
Row = Mapping[str, Any]


def worst(figures: Iterable[float | None]) -> float | None:
    """The largest, NaN above all; None of nothing."""
    known = [figure for figure in figures if figure is not None]
    return max(known, key=lambda x: math.inf if math.isnan(x) else x) if known else None


def findings(file: ResultFile) -> list[Finding]:
    """Whether the library keeps its bounds; each that it does not keep."""
    held = [row for row in file.results if row["provider"] != EAGER]
    beyond = [(row, metric) for row in held for metric in row["exceeded"]]
    if not beyond:
        return [Finding(f"{len(held)} measurements of the library, none beyond its bound", "win")]
    found = [Finding(f"{len(beyond)} figures of {len(held)} measurements are beyond their bound", "loss")]
    return found + [
        Finding(
            f"{row['provider']} {row['dtype']}, V {row['classes']}, perturbation {row['perturbation']:g}, clean "
            f"{row['clean']}: {metric} {error(row[metric])}, bound {error(row['bounds'][metric])}",
            "loss",
        )
        for row, metric in beyond
    ]


def plots(file: ResultFile) -> list[Plot]:
    """A plot a dtype and metric: the worst error against the perturbation."""
    made = []
    rows: Sequence[Row] = file.results
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for metric, words in METRICS.items():
            own = [row for row in rows if row["dtype"] == dtype and row[metric] is not None]
            if not own:
                continue
            series = []
            for provider in dict.fromkeys(row["provider"] for row in own):
                points = []
                for size in sorted({row["perturbation"] for row in own if row["provider"] == provider}):
                    value = worst(r[metric] for r in own if (r["provider"], r["perturbation"]) == (provider, size))
                    points.append(Point(size, value, f"{provider}, perturbation {size:g}: {error(value)}"))
                series.append(Series(provider, points, *look(provider), line=True))
            made.append(
                Plot(
                    f"{dtype}: {words}",
                    f"Largest {words} of {dtype} logits against the perturbation; both axes are logarithmic, lower is "
                    "better.",
                    log_scale([row["perturbation"] for row in own], error, most=4),
                    log_scale([row[metric] for row in own], error),
                    "perturbation",
                    "relative error",
                    series,
                    note="Lower is better.",
                )
            )
    return made


def body(file: ResultFile) -> Html:
    drawn = plots(file)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in file.results:
        groups.setdefault((row["provider"], row["dtype"], row["classes"]), []).append(row)
    lines = [
        (*key, *(error(worst(row[metric] for row in rows)) for metric in ("value", "whole", "median")),
         sum(bool(row["exceeded"]) for row in rows))
        for key, rows in groups.items()
    ]  # fmt: skip
    head = ("provider", "dtype", "V", "value", "whole gradient", "median row", "beyond bound")
    shown = tag("h4", "Worst over perturbations and clean logits")
    return joined(
        (legend_of(drawn), panels(*(draw(plot) for plot in drawn)), shown, table(head, lines, text_columns=3))
    )


def _rows(file: ResultFile, provider: str, dtype: str) -> list[Mapping[str, Any]]:
    return [row for row in file.results if (row["provider"], row["dtype"]) == (provider, dtype)]


def compared(file: ResultFile) -> dict[str, str]:
    """Worst value and gradient of a provider and dtype."""
    pairs = dict.fromkeys((row["provider"], row["dtype"]) for row in file.results)
    return {
        f"{provider} {dtype}": ", ".join(
            f"{metric} {error(worst(row[metric] for row in _rows(file, provider, dtype)))}" for metric in METRICS
        )
        for provider, dtype in pairs
    }
