"""What the passes of a step on a part of the batch take, each alone, and their sum."""

from collections.abc import Mapping
from typing import Any

from .files import ResultFile
from .markup import Finding, Html, joined, table, tag
from .numbers import ms, span, times

TITLE = "Passes of a step on a part of the batch"
INTRO = (
    "Passes of the model without this library, each timed alone, and their sum over a standard step with the clean "
    "pass in two parts and masks drawn in each; counted is what it would be if every product ran equally fast."
)
WORDS = {
    "standard": "forward and backward, all samples",
    "rest": "forward and backward, the samples that are not chosen",
    "part": "forward and backward, the chosen samples",
    "ascent": "forward and backward to the embeddings, the chosen samples",
}
TIMES = {"standard": "", "rest": 1, "part": 2, "ascent": 1}


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['shape']}, {row['fraction']:g} of the batch"


def _words(row: Mapping[str, Any]) -> str:
    return f"{times(row['floor_of_standard'])} a standard step, counted {times(row['bound_at_fraction'])}"


def findings(file: ResultFile) -> list[Finding]:
    return [Finding(f"{_name(row)}: the passes take {_words(row)}") for row in file.results]


def body(file: ResultFile) -> Html:
    head = ("pass", "times", "median ms", "p20–p80")
    parts = []
    for row in file.results:
        lines = [
            (WORDS.get(name, name), TIMES.get(name, ""), ms(timing), span(timing))
            for name, timing in row["timings"].items()
        ]
        parts += [tag("h4", _name(row)), table(head, lines)]
    return joined(parts)


def compared(file: ResultFile) -> dict[str, str]:
    return {_name(row): _words(row) for row in file.results}
