"""The divergence of a linear head without its logits: accuracy, time and memory of each way."""

from collections.abc import Mapping
from typing import Any

from .files import ResultFile
from .markup import Bar, Finding, Html, bars, joined, panels, table, tag
from .numbers import error, mebibytes, ms, percent, span, times
from .svg import look

TITLE = "Linear head"
INTRO = (
    "The divergence of two hidden states through a linear head, forward and backward. fused never holds the logits; "
    "products are its matrix products alone, which nothing can be faster than that takes them so."
)
Row = Mapping[str, Any]


def costs(file: ResultFile) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by dtype and sizes."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in file.results.get("cost", ()):
        groups.setdefault((row["dtype"], row["rows"], row["hidden"], row["vocabulary"]), []).append(row)
    return groups


def _name(key: tuple[Any, ...]) -> str:
    return f"{key[0]}, N {key[1]}, H {key[2]}, V {key[3]}"


def _of(rows: list[Row], name: str) -> Row | None:
    return next((row for row in rows if row["way"] == name), None)


def _median(row: Row | None) -> float | None:
    return None if row is None or row["timing"] is None else row["timing"]["median_s"]


def _ratio(first: float | None, second: float | None) -> float | None:
    return None if first is None or not second else first / second


def findings(file: ResultFile) -> list[Finding]:
    found = []
    for key, rows in costs(file).items():
        fused = _of(rows, "fused")
        for row in rows:
            if row["way"] in ("fused", "products"):
                continue
            factor = _ratio(_median(row), _median(fused))
            if factor is not None:
                slower = "" if factor >= 1 else ": fused is slower"
                words = f"{_name(key)}: {row['way']} takes {times(factor)} as long as fused{slower}"
                found.append(Finding(words, "win" if factor >= 1 else "loss"))
            share = _ratio(None if fused is None else fused["peak_bytes"], row["peak_bytes"])
            if share is not None:
                words = f"{_name(key)}: fused holds {percent(share)} of the memory of {row['way']}"
                found.append(Finding(words, "win" if share <= 1 else "loss"))
    return found


def body(file: ResultFile) -> Html:
    parts = []
    for key, rows in costs(file).items():
        eager, products = _of(rows, "eager"), _of(rows, "products")
        time = [
            Bar(r["way"], 1e3 * m, f"{ms(r['timing'])} ms", look(r["way"])[0],
                1e3 * r["timing"]["p20_s"], 1e3 * r["timing"]["p80_s"])
            for r in rows if (m := _median(r)) is not None
        ]  # fmt: skip
        memory = [
            Bar(row["way"], row["peak_bytes"], f"{mebibytes(row['peak_bytes'])} MiB", look(row["way"])[0])
            for row in rows
            if row["peak_bytes"] is not None
        ]
        lines = [
            (row["way"], ms(row["timing"]), span(row["timing"]), times(_ratio(_median(row), _median(eager))),
             times(_ratio(_median(row), _median(products))), mebibytes(row["peak_bytes"]),
             percent(_ratio(row["peak_bytes"], None if eager is None else eager["peak_bytes"])))
            for row in rows
        ]  # fmt: skip
        head = ("way", "median ms", "p20–p80", "of eager", "of products", "peak MiB", "of eager's")
        drawn = [bars("time", time)] if time else []
        drawn += [bars("peak memory", memory)] if memory else []
        parts += [tag("h4", _name(key)), panels(*drawn), table(head, lines)]
    if accuracy := file.results.get("accuracy"):
        head = ("way", "dtype", "perturbation", "value", "d h_adv", "d h", "dW")
        lines = [(r["way"], r["dtype"], f"{r['perturbation']:g}", *map(error, r["errors"])) for r in accuracy]
        parts += [tag("h4", "Errors against float64"), table(head, lines, text_columns=3)]
    return joined(parts)


def compared(file: ResultFile) -> dict[str, str]:
    return {
        f"{_name(key)}: {row['way']}": f"{ms(row['timing'])} ms, {mebibytes(row['peak_bytes'])} MiB"
        for key, rows in costs(file).items()
        for row in rows
    }
