"""Cheaper estimators of the adversarial gradient: what they save, and what they change."""

from collections.abc import Mapping
from typing import Any

from .files import ResultFile
from .markup import Bar, Finding, Html, intervals, joined, panels, table, toned
from .numbers import number, signed_percent, times
from .svg import Plot, Point, Series, draw, legend, linear_scale, log_scale, looks

TITLE = "Estimators"
INTRO = (
    "Bias: relative, along the exact mean gradient, with its 95 % interval. Variance: what an estimator adds, relative "
    "to the variance of the exact step's gradient. Cost: its step over the standard step."
)
Row = Mapping[str, Any]


def name(row: Row) -> str:
    setting = "" if row["setting"] in (None, "") else f", {row['setting']}"
    return f"{row['estimator']}{setting}"


def is_biased(row: Row) -> bool | None:
    """Whether the interval leaves zero out; None without an interval."""
    if row["bias_low"] is None or row["bias_high"] is None:
        return None
    return not row["bias_low"] <= 0 <= row["bias_high"]


def findings(file: ResultFile) -> list[Finding]:
    """Of every estimator, whether the measurement agrees with what is claimed of its bias."""
    found = []
    for row in file.results:
        words, biased = f"{name(row)}: bias {interval(row)}", is_biased(row)
        if row["unbiased"] is True and biased:
            found.append(Finding(f"{words}, although it should have none", "loss"))
        elif row["unbiased"] is True and biased is False:
            found.append(Finding(f"{words}: agrees with none", "win"))
        elif biased:
            found.append(Finding(f"{words}: biased", "loss"))
    return found


def interval(row: Row) -> str:
    if row["bias"] is None:
        return "not measured"
    if is_biased(row) is None:
        return signed_percent(row["bias"])
    return f"{signed_percent(row['bias'])} ({signed_percent(row['bias_low'])} to {signed_percent(row['bias_high'])})"


def body(file: ResultFile) -> Html:
    rows = file.results
    marks = looks(list(dict.fromkeys(row["estimator"] for row in rows)))
    with_bias = [
        Bar(name(row), row["bias"], interval(row), marks[row["estimator"]][0], row["bias_low"], row["bias_high"])
        for row in rows
        if row["bias"] is not None
    ]
    drawn: list[Html] = []
    if with_bias:
        drawn.append(intervals("Bias", with_bias, "Dashed: none. The band is the 95 % interval."))
    if (plot := variance_against_cost(file)) is not None:
        drawn.append(draw(plot))
    names = [(estimator, colour, kind, False) for estimator, (colour, kind) in marks.items()]
    head = ("estimator", "setting", "cost", "cost bound", "bias", "95 % interval", "added variance", "batches",
            "unbiased",
            "changes")  # fmt: skip
    lines = [
        (row["estimator"], "" if row["setting"] is None else row["setting"], times(row["cost"]),
         times(row["cost_bound"]), signed_percent(row["bias"]),
         f"{signed_percent(row['bias_low'])} to {signed_percent(row['bias_high'])}", number(row["variance"]),
         number(row["batches"]), _claim(row), row["changes"] or "")
        for row in rows
    ]  # fmt: skip
    return joined((legend(names) if names else "", panels(*drawn), table(head, lines, text_columns=2)))


def _claim(row: Row) -> object:
    claimed = {True: "yes", False: "no", None: "not claimed"}[row["unbiased"]]
    return toned(f"{claimed}, refuted", "loss") if row["unbiased"] is True and is_biased(row) else claimed


def variance_against_cost(file: ResultFile) -> Plot | None:
    """None where no estimator has both."""
    rows = [row for row in file.results if row["variance"] is not None and row["cost"] is not None]
    if not rows:
        return None
    marks = looks(list(dict.fromkeys(row["estimator"] for row in file.results)))
    values = [row["variance"] for row in rows]
    positive = min(values) > 0 and max(values) / min(values) > 30
    series = [
        Series(
            row["estimator"],
            [
                Point(
                    row["cost"],
                    row["variance"],
                    f"{name(row)}: cost {times(row['cost'])}, variance {row['variance']:g}",
                )
            ],
            *marks[row["estimator"]],
        )
        for row in rows
    ]
    form = number
    return Plot(
        "Added variance against cost",
        "Variance that each estimator adds, relative to that of the exact gradient, against the cost of its step in "
        "standard steps; lower left is better.",
        linear_scale([row["cost"] for row in rows], form),
        log_scale(values, form) if positive else linear_scale(values, form, zero=min(values) >= 0),
        "cost of a step (standard = 1)",
        "added variance",
        series,
        note="Lower left is better.",
    )


def compared(file: ResultFile) -> dict[str, str]:
    return {
        name(row): f"cost {times(row['cost'])}, bias {interval(row)}, variance {number(row['variance'])}"
        for row in file.results
    }
