"""Plots as inline SVG, drawn at the width of a phone so that their text keeps its size there.

Colours come from classes of the page's style, so that a plot follows the light or the dark scheme.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .markup import Html, joined, tag

WIDTH, HEIGHT = 316, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 28, 50
SHAPES = ("circle", "square", "triangle", "diamond", "down")
RADIUS = 5.0

FIXED = {
    "standard": ("neutral", "circle"), "eager": ("neutral", "circle"), "naive": ("neutral", "circle"),
    "compile": ("c1", "triangle"), "liger": ("c2", "diamond"), "smart-pytorch": ("c2", "diamond"),
    "native": ("c0", "square"), "ours": ("c0", "square"), "fused": ("c0", "square"), "triton": ("c3", "down"),
    "reference": ("c4", "diamond"),
}  # fmt: skip
OTHERS = ("c5", "c4", "c1", "c2", "c3", "c6")


def look(name: str) -> tuple[str, str]:
    """Colour class and shape of a provider, the same in every plot; a variant looks like what it is a variant of."""
    for known in (name, name.split(",")[0], name.split(" ")[0]):
        if known in FIXED:
            return FIXED[known]
    place = sum(map(ord, name))
    return OTHERS[place % len(OTHERS)], SHAPES[place % len(SHAPES)]


def looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colours and shapes for names that are no providers, all different up to seven."""
    colours = ("neutral", "c0", "c3", "c1", "c2", "c5", "c4", "c6")
    return {name: (colours[i % len(colours)], SHAPES[i % len(SHAPES)]) for i, name in enumerate(names)}


@dataclass(frozen=True)
class Scale:
    """An axis: where a value lies between 0 and 1, and which values are written."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]
    form: Callable[[float], str]

    def place(self, value: float) -> float | None:
        """None for what an axis cannot show; what is not positive lies at the end of a logarithmic one."""
        if not math.isfinite(value):
            return None
        if not self.log:
            return (value - self.low) / (self.high - self.low)
        if value <= self.low:
            return 0.0
        return math.log(value / self.low) / math.log(self.high / self.low)


def log_scale(
    values: Sequence[float], form: Callable[[float], str], *, base: int = 10, most: int = 5, pad: float = 0.06
) -> Scale:
    """Powers of ``base`` that hold all positive values, and a little more; at most ``most`` are written."""
    good = [value for value in values if math.isfinite(value) and value > 0] or [1.0]
    low, high = min(good), max(good)
    if high / low < base**1.2:
        low, high = low / base**0.6, high * base**0.6
    stretch = (high / low) ** pad
    low, high = low / stretch, high * stretch
    first, last = math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9)
    step = max(math.ceil((last - first + 1) / most), 1)
    ticks = tuple(float(base) ** power for power in range(first, last + 1, step))
    return Scale(low, high, True, ticks, form)


def linear_scale(values: Sequence[float], form: Callable[[float], str], *, zero: bool = False, most: int = 5) -> Scale:
    """Round steps that hold all values, with zero if asked for."""
    good = [value for value in values if math.isfinite(value)] + ([0.0] if zero else [])
    low, high = min(good, default=0.0), max(good, default=1.0)
    if high == low:
        low, high = low - (abs(low) or 1.0) * 0.1, high + (abs(high) or 1.0) * 0.1
    room = 0.08 * (high - low)
    low, high = low if zero and low == 0 else low - room, high + room
    raw = (high - low) / most
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    ticks = tuple(step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1))
    return Scale(low, high, False, ticks, form)


@dataclass(frozen=True)
class Point:
    """A place, what it says when pointed at, and the ends of its whisker."""

    x: float
    y: float
    words: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one look; ``line`` joins them, ``hollow`` leaves their inside open."""

    name: str
    points: Sequence[Point]
    colour: str
    shape: str
    line: bool = False
    hollow: bool = False


@dataclass(frozen=True)
class Plot:
    """Axes and what is in them.

    Attributes:
        title: what it shows, above it.
        description: the same for who does not see it.
        x, y: axes.
        x_label, y_label: what they are.
        series: points and lines.
        rules: horizontal lines: value, what they are, class.
        failed: sizes (x) at which a series has no value: x, colour, what is said of it.
        note: a remark in the caption.
    """

    title: str
    description: str
    x: Scale
    y: Scale
    x_label: str
    y_label: str
    series: Sequence[Series]
    rules: Sequence[tuple[float, str, str]] = ()
    failed: Sequence[tuple[float, str, str]] = ()
    note: str = ""
    hidden: int = field(default=0)


def shape(kind: str, x: float, y: float, colour: str, *, hollow: bool = False, size: float = RADIUS) -> Html:
    """One mark."""
    look_of = f"mark {colour}{' hollow' if hollow else ''}"
    if kind == "circle":
        return tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=f"{size:.1f}", class_=look_of)
    corners = {
        "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "triangle": ((0, -1.2), (1.1, 0.9), (-1.1, 0.9)),
        "diamond": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
        "down": ((0, 1.2), (1.1, -0.9), (-1.1, -0.9)),
    }[kind]
    return tag("polygon", points=" ".join(f"{x + size * a:.1f},{y + size * b:.1f}" for a, b in corners), class_=look_of)


def _line(x1: float, y1: float, x2: float, y2: float, look_of: str) -> Html:
    return tag("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=look_of)


def _text(x: float, y: float, words: str, look_of: str) -> Html:
    return tag("text", words, x=f"{x:.1f}", y=f"{y:.1f}", class_=look_of)


def legend(entries: Sequence[tuple[str, str, str, bool]]) -> Html:
    """Names beside their marks: name, colour, shape, hollow."""
    return tag(
        "ul",
        *(
            tag("li", tag("svg", shape(kind, 8, 8, colour, hollow=hollow), viewBox="0 0 16 16", aria_hidden="true"),
                tag("span", name))
            for name, colour, kind, hollow in entries
        ),
        class_="legend",
    )  # fmt: skip


def legend_of(plots: Sequence[Plot]) -> Html:
    """One legend for plots that share their looks."""
    entries = {(s.name, s.colour, s.shape, s.hollow): None for plot in plots for s in plot.series if s.points}
    return legend(list(entries))


def draw(plot: Plot) -> Html:
    """The plot with its caption; a value that the axes cannot show is counted in the caption."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(value: float) -> float | None:
        place = plot.x.place(value)
        return None if place is None else LEFT + place * (right - LEFT)

    def up(value: float) -> float | None:
        place = plot.y.place(value)
        return None if place is None else bottom - place * (bottom - TOP)

    parts, hidden = [], plot.hidden
    for tick in plot.y.ticks:
        parts += [
            _line(LEFT, up(tick), right, up(tick), "grid"),
            _text(LEFT - 6, up(tick) + 5, plot.y.form(tick), "tick end"),
        ]
    for tick in plot.x.ticks:
        parts += [_line(across(tick), bottom, across(tick), bottom + 4, "axis"),
                  _text(across(tick), bottom + 19, plot.x.form(tick), "tick middle")]  # fmt: skip
    parts.append(_line(LEFT, bottom, right, bottom, "axis"))
    parts += [_text(2, 15, plot.y_label, "label"), _text(right, HEIGHT - 8, plot.x_label, "label end")]
    for value, words, look_of in plot.rules:
        if (height := up(value)) is not None and TOP - 1 <= height <= bottom + 1:
            parts += [
                _line(LEFT, height, right, height, f"rule {look_of}"),
                _text(LEFT + 4, height - 4, words, "tick"),
            ]
    for series in plot.series:
        places = [(point, across(point.x), up(point.y)) for point in series.points]
        hidden += sum(x is None or y is None for _, x, y in places)
        seen = [(point, x, y) for point, x, y in places if x is not None and y is not None]
        if series.line and len(seen) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for _, x, y in seen)
            parts.append(tag("polyline", points=path, class_=f"line {series.colour}"))
        for point, x, y in seen:
            whisker = []
            if point.low is not None and point.high is not None:
                whisker.append(_line(x, up(point.low), x, up(point.high), f"line {series.colour}"))
            mark = shape(series.shape, x, y, series.colour, hollow=series.hollow)
            parts.append(tag("g", tag("title", point.words), *whisker, mark))
    for number, (value, colour, words) in enumerate(plot.failed):
        x, y = across(value), TOP + 8 + 12 * (number % 2)
        cross = joined(
            (_line(x - 5, y - 5, x + 5, y + 5, f"line {colour}"), _line(x - 5, y + 5, x + 5, y - 5, f"line {colour}"))
        )
        parts.append(tag("g", tag("title", words), cross))
    drawn = tag(
        "svg",
        tag("title", plot.title),
        tag("desc", plot.description),
        *parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{plot.title}. {plot.description}",
    )
    notes = [plot.note] if plot.note else []
    if plot.failed:
        notes.append("A cross at the top: " + "; ".join(dict.fromkeys(words for _, _, words in plot.failed)) + ".")
    if hidden:
        notes.append(f"{hidden} values are not finite and not drawn.")
    caption = tag("figcaption", tag("strong", plot.title), *([tag("span", " ".join(notes))] if notes else []))
    return tag("figure", caption, drawn, class_="panel")
