"""Peak memory of every method, beside that of standard training."""

from collections.abc import Mapping
from typing import Any

from .files import ResultFile
from .markup import Bar, Finding, Html, bars, joined, panels, table, tag
from .numbers import DASH, mebibytes, times
from .svg import look

TITLE = "Memory of the methods"
INTRO = (
    "Bytes that a step holds at its peak, of every method on the same model and batch. Activations are the peak of a "
    "step whose gradients have their place already."
)
Row = Mapping[str, Any]


def batches(file: ResultFile) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in file.results:
        groups.setdefault((row["task"], row["batch"], row["length"]), []).append(row)
    return groups


def _name(key: tuple[Any, ...]) -> str:
    return f"{key[0]}, batch {key[1]} x {key[2]}"


def _reason(row: Row) -> str | None:
    return row.get("not_run") or ("no figure in the file" if row["peak_bytes"] is None else None)


def findings(file: ResultFile) -> list[Finding]:
    """The smallest and the largest of each batch."""
    found = []
    for key, rows in batches(file).items():
        held = [row for row in rows if row["of_standard"] is not None and row["method"] != "standard"]
        if held:
            least, most = (end(held, key=lambda row: row["of_standard"]) for end in (min, max))
            found.append(
                Finding(
                    f"{_name(key)}: from {times(least['of_standard'])} the memory of a standard step "
                    f"({least['method']}) to {times(most['of_standard'])} ({most['method']})"
                )
            )
    return found


def body(file: ResultFile) -> Html:
    parts = []
    for key, rows in batches(file).items():
        drawn = [
            Bar(
                row["method"],
                row["peak_bytes"],
                _words(row),
                look(row["method"])[0] if row["method"] == "standard" else "c0",
            )
            for row in rows
        ]
        head = ("method", "peak MiB", "of standard", "activations MiB", "of standard", "forward passes", "note")
        lines = [
            (row["method"], mebibytes(row["peak_bytes"]), times(row["of_standard"]),
             mebibytes(row["activation_bytes"]), times(row["activations_of_standard"]),
             DASH if row["forwards"] is None else row["forwards"], _reason(row) or row["note"] or "")
            for row in rows
        ]  # fmt: skip
        parts += [tag("h4", _name(key)), panels(bars("Peak memory", drawn)), table(head, lines)]
    return joined(parts)


def _words(row: Row) -> str:
    reason = _reason(row)
    if reason is not None:
        return f"not run: {reason}"
    share = "" if row["of_standard"] is None else f", {times(row['of_standard'])}"
    return f"{mebibytes(row['peak_bytes'])} MiB{share}"


def compared(file: ResultFile) -> dict[str, str]:
    return {f"{_name(key)}: {row['method']}": _words(row) for key, rows in batches(file).items() for row in rows}
