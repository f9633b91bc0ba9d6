"""Does it help: metrics and accuracy under attack by method, against the cost of a step."""

from collections.abc import Mapping, Sequence
from typing import Any

from .files import ResultFile
from .markup import Finding, Html, facts, joined, panels, table, tag
from .numbers import number, percent, signed_percent, times
from .svg import Plot, Point, Series, draw, legend, linear_scale, looks

TITLE = "Quality"
INTRO = (
    "Models fine-tuned with each method from the same weights on the same batches. Equal steps: as many steps for all; "
    "equal time: as many as the costliest method's time affords. Medians over the seeds with quartiles. A method is "
    "called better or worse only where its quartiles lie apart from those of standard training."
)
STANDARD = "standard"
EQUAL_STEPS = "equal steps"
ASIDE = 0.008
"""Share of the cost by which the two modes stand apart, so that they do not hide each other."""
Row = Mapping[str, Any]


def findings(file: ResultFile) -> list[Finding]:
    """The verdicts of the file, in its own words."""
    return [Finding(sentence, _tone(sentence)) for sentence in file.content["verdict"]]


def _tone(sentence: str) -> str:
    if "nothing is better" in sentence:
        return "loss" if "; worse:" in sentence else "plain"
    return "plain" if "; worse:" in sentence else "win"


def figure_name(file: ResultFile, figure: str) -> str:
    """What a figure is called, with the radius of an attack."""
    if not figure.startswith("attacked_"):
        return figure.replace("_", " ")
    norm = figure.removeprefix("attacked_")
    radius = file.content["settings"]["attack"].get(norm)
    return f"accuracy under attack, {norm}" + ("" if radius is None else f" {radius:g}")


def _cost(entry: Row) -> float:
    return entry["ms_per_step"] if entry["of_standard"] is None else entry["of_standard"]


def plots(file: ResultFile) -> list[Plot]:
    """A plot a task and figure: quality against the cost of a step."""
    entries: Sequence[Row] = file.content["summary"]
    marks = looks(list(dict.fromkeys(entry["method"] for entry in entries)))
    made = []
    for task, about in file.content["tasks"].items():
        own = [entry for entry in entries if entry["task"] == task]
        relative = all(entry["of_standard"] is not None for entry in own)
        for figure in (name for name in about["figures"] if any(name in entry["figures"] for entry in own)):
            drawn = [entry for entry in own if figure in entry["figures"]]
            series = []
            for entry in drawn:
                steps, spread = entry["mode"] == EQUAL_STEPS, entry["figures"][figure]
                place = _cost(entry) * (1 + (-ASIDE if steps else ASIDE))
                words = f"{entry['method']}, {entry['mode']}: {number(spread['median'])}"
                point = Point(place, spread["median"], words, spread["lower"], spread["upper"])
                series.append(Series(entry["method"], [point], *marks[entry["method"]], hollow=not steps))
            rules = tuple(
                (entry["figures"][figure]["median"], "", "strong" if entry["mode"] == EQUAL_STEPS else "")
                for entry in drawn
                if entry["method"] == STANDARD
            )
            ends = [
                v for entry in drawn for v in (entry["figures"][figure]["lower"], entry["figures"][figure]["upper"])
            ]
            made.append(
                Plot(
                    f"{about['title']}: {figure_name(file, figure)}",
                    "Median and quartiles of each method against the cost of its step; filled at equal steps, hollow "
                    "at equal time; dashed lines are standard training.",
                    linear_scale([_cost(entry) for entry in drawn], lambda value: f"{value:.3g}"),
                    linear_scale(ends, lambda value: f"{value:.3g}"),
                    "cost of a step (standard = 1)" if relative else "ms per step",
                    figure_name(file, figure).split(",")[0],
                    series,
                    rules=rules,
                    note="Higher is better. Dashed: standard training.",
                )
            )
    return made


def body(file: ResultFile) -> Html:
    entries = file.content["summary"]
    marks = looks(list(dict.fromkeys(entry["method"] for entry in entries)))
    names = [(name, colour, kind, False) for name, (colour, kind) in marks.items()]
    modes = [("filled: equal steps", "neutral", "circle", False), ("hollow: equal time", "neutral", "circle", True)]
    parts: list[object] = [legend([*names, *modes]) if names else "", panels(*(draw(plot) for plot in plots(file)))]
    for task, about in file.content["tasks"].items():
        own = [entry for entry in entries if entry["task"] == task]
        parts += [tag("h4", f"{about['title']}: every method"), _table(file, own, about["figures"])]
    plain = [(n, v) for n, v in file.content["settings"].items() if isinstance(v, (int, float, str))]
    parts.append(tag("details", tag("summary", "Settings"), facts((n.replace("_", " "), v) for n, v in plain)))
    return joined(parts)


def _table(file: ResultFile, entries: Sequence[Row], figures: Sequence[str]) -> Html:
    head = ["method", "mode", "steps", "seeds", "cost"]
    for figure in figures:
        head += [figure_name(file, figure), "quartiles", "over standard"]
    lines = []
    for entry in entries:
        cells: list[object] = [
            entry["method"], entry["mode"], entry["steps"], len(entry["seeds"]), times(entry["of_standard"]),
        ]  # fmt: skip
        for figure in figures:
            spread = entry["figures"].get(figure)
            if spread is None:
                cells += [percent(None)] * 3
            else:
                quartiles = f"{number(spread['lower'])} to {number(spread['upper'])}"
                cells += [number(spread["median"]), quartiles, _points(spread["over_standard"])]
        lines.append(cells)
    return table(head, lines, text_columns=2)


def _points(difference: float | None) -> str:
    """A difference of shares in points of percent."""
    return signed_percent(difference).replace(" %", " pt")


def compared(file: ResultFile) -> dict[str, str]:
    return {
        f"{entry['task']}: {entry['method']}, {entry['mode']}": ", ".join(
            f"{figure_name(file, name)} {number(spread['median'])}" for name, spread in entry["figures"].items()
        )
        for entry in file.content["summary"]
    }
