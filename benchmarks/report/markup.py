"""HTML from text that is never trusted: everything is escaped that is not markup already."""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

LONG_TABLE = 18
"""Rows beyond which a table starts folded."""


class Html(str):
    """Markup, not escaped again."""

    __slots__ = ()


def escaped(value: object) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def joined(parts: Iterable[object]) -> Html:
    return Html("".join(escaped(part) for part in parts))


def tag(name: str, *children: object, **attributes: Any) -> Html:
    """An element; ``class_`` is class, ``data_label`` data-label, None leaves an attribute away.

    Example:
        >>> tag("b", "1 < 2", class_="loss")
        '<b class="loss">1 &lt; 2</b>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>{joined(children)}</{name}>")


@dataclass(frozen=True)
class Finding:
    """One sentence about a result file; ``tone`` is win, loss or plain."""

    text: str
    tone: str = "plain"


@dataclass(frozen=True)
class NotRun:
    """A row of a table without figures: what it is about, and why there are none."""

    cells: Sequence[object]
    reason: str


@dataclass(frozen=True)
class Bar:
    """One bar; ``value`` None shows the ``text`` alone.

    Attributes:
        label: what it is.
        value: its length.
        text: the value in words.
        colour: class of its colour.
        low, high: ends of its whisker.
        bound: place of a mark on it.
    """

    label: str
    value: float | None
    text: object
    colour: str
    low: float | None = None
    high: float | None = None
    bound: float | None = None


def toned(text: str, tone: str) -> Html:
    """A win or a loss; its word stands beside the figure, so that colour is not all that tells them apart."""
    return tag("span", text, class_=tone)


def against(factor: float | None, text: str) -> Html:
    """How many times as long another provider takes: above one is a win, below one says that ours is slower."""
    if factor is None:
        return escaped(text)
    return toned(text, "win") if factor >= 1 else toned(f"{text} slower", "loss")


def table(head: Sequence[str], rows: Sequence[Sequence[object] | NotRun], *, text_columns: int = 1) -> Html:
    """A table that becomes cards on a narrow screen; a long one starts folded.

    Args:
        head: names of the columns.
        rows: cells, as many as columns, or rows that were not run.
        text_columns: columns of words at the left; the first is the title of a card.
    """
    if not rows:
        return Html("")
    columns = tag("tr", *(tag("th", name, scope="col", role="columnheader") for name in head), role="row")
    body = joined(_row(head, row, text_columns) for row in rows)
    whole = tag(
        "div",
        tag("table", tag("thead", columns, role="rowgroup"), tag("tbody", body, role="rowgroup"), role="table"),
        class_=f"scroll words-{text_columns}",
        tabindex="0",
    )
    if len(rows) <= LONG_TABLE:
        return whole
    return tag("details", tag("summary", f"Table of all {len(rows)} rows"), whole)


def _row(head: Sequence[str], row: Sequence[object] | NotRun, text_columns: int) -> Html:
    if isinstance(row, NotRun):
        first = [_cell(name, cell, number, text_columns) for number, (name, cell) in enumerate(zip(head, row.cells))]  # noqa: B905 - the rest is the reason
        rest = tag("td", f"not run: {row.reason}", class_="not-run", colspan=len(head) - len(first), role="cell")
        return tag("tr", *first, rest, role="row")
    return tag(
        "tr",
        *(_cell(name, cell, i, text_columns) for i, (name, cell) in enumerate(zip(head, row, strict=True))),
        role="row",
    )


def _cell(name: str, cell: object, column: int, text_columns: int) -> Html:
    kind = "title" if column == 0 else "words" if column < text_columns else "figure"
    return tag("td", tag("span", cell), data_label=name, class_=kind, role="cell")


def bars(title: str, rows: Sequence[Bar], *, reference: float | None = None, note: str | None = None) -> Html:
    """Horizontal bars from zero, with whiskers, marks and a line at ``reference``; a picture with words, no script."""
    reach = [v for bar in rows for v in (bar.value, bar.high, bar.bound, reference) if v is not None]
    longest = 1.02 * max(reach, default=1.0) or 1.0

    def percentage(value: float) -> str:
        return f"{100 * value / longest:.2f}%"

    def one(bar: Bar) -> Html:
        parts = []
        if bar.value is not None:
            parts.append(tag("i", class_=f"fill {bar.colour}", style=f"width:{percentage(bar.value)}"))
        if bar.low is not None and bar.high is not None:
            place = f"left:{percentage(bar.low)};width:{percentage(bar.high - bar.low)}"
            parts.append(tag("i", class_="whisker", style=place))
        if reference is not None:
            parts.append(tag("i", class_="reference", style=f"left:{percentage(reference)}"))
        if bar.bound is not None:
            parts.append(tag("i", class_="bound", style=f"left:{percentage(bar.bound)}"))
        words = tag("div", tag("span", bar.label), tag("b", bar.text), class_="bar-words")
        return tag("li", words, tag("div", *parts, class_="track", aria_hidden="true"))

    caption = tag("figcaption", tag("strong", title), *([tag("span", note)] if note else []))
    return tag("figure", caption, tag("ul", *(one(bar) for bar in rows), class_="bars"), class_="panel")


def intervals(title: str, rows: Sequence[Bar], note: str) -> Html:
    """Values with their intervals on a line that holds zero."""
    reach = [abs(v) for bar in rows for v in (bar.value, bar.low, bar.high) if v is not None]
    furthest = 1.05 * max(reach, default=1.0) or 1.0

    def percentage(value: float) -> float:
        return 50 + 50 * value / furthest

    def one(bar: Bar) -> Html:
        parts = [tag("i", class_="reference", style="left:50%")]
        if bar.low is not None and bar.high is not None:
            left, right = percentage(bar.low), percentage(bar.high)
            parts.append(tag("i", class_=f"interval {bar.colour}", style=f"left:{left:.2f}%;width:{right - left:.2f}%"))
        if bar.value is not None:
            parts.append(tag("i", class_=f"dot {bar.colour}", style=f"left:{percentage(bar.value):.2f}%"))
        words = tag("div", tag("span", bar.label), tag("b", bar.text), class_="bar-words")
        return tag("li", words, tag("div", *parts, class_="track open", aria_hidden="true"))

    caption = tag("figcaption", tag("strong", title), tag("span", note))
    return tag("figure", caption, tag("ul", *(one(bar) for bar in rows), class_="bars"), class_="panel")


def facts(pairs: Iterable[tuple[str, object]]) -> Html:
    """Names and values."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs))


def findings(found: Sequence[Finding]) -> Html:
    return tag("ul", *(tag("li", one.text, class_=one.tone) for one in found), class_="findings") if found else Html("")


def panels(*figures: object) -> Html:
    """Figures beside each other, as many as there is room for."""
    return tag("div", *figures, class_="panels") if figures else Html("")


def notice(text: str) -> Html:
    return tag("p", text, class_="notice")
