"""What a result file of each benchmark must hold, so that a malformed one is named instead of drawn wrongly."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class FormError(ValueError):
    """A value that is not of its form; the message says where it is and what is expected."""


@dataclass(frozen=True)
class Optional:
    """The form, or null."""

    form: Any


@dataclass(frozen=True)
class Each:
    """A list whose elements have the form."""

    form: Any


@dataclass(frozen=True)
class Values:
    """An object of any keys, whose values have the form."""

    form: Any


@dataclass(frozen=True)
class Maybe:
    """A key that need not be there."""

    form: Any


TEXT, NUMBER, FLAG, ANYTHING = "text", "a number", "true or false", "anything"
FIGURE = Optional(NUMBER)
MEDIAN = {"median_s": NUMBER, "p20_s": NUMBER, "p80_s": NUMBER}
NOT_RUN = Optional(TEXT)
SPREAD = {"by_seed": Each(NUMBER), "median": NUMBER, "lower": NUMBER, "upper": NUMBER, "over_standard": FIGURE}

FORMS: dict[str, dict[str, Any]] = {
    "ops": {
        "results": Each(
            {
                "op": TEXT, "case": TEXT, "timings": Values(MEDIAN), "bytes_moved": NUMBER,
                "copy_bytes_per_second": NUMBER, "peak_bytes": Optional(Values(NUMBER)), "out_of_memory": Each(TEXT),
            }
        )
    },
    "step": {
        "results": Each(
            {
                "shape": ANYTHING, "task": TEXT, "model": ANYTHING, "batch": NUMBER, "length": NUMBER,
                "provider": TEXT, "mode": TEXT, "timing": Optional(MEDIAN), "of_standard": FIGURE,
                "flop_bound": FIGURE, "of_bound": FIGURE, "peak_bytes": FIGURE, "model_share": FIGURE,
                "kernel_share": FIGURE, "launches": FIGURE, "not_run": NOT_RUN,
            }
        )
    },
    "growth": {
        "results": Each(
            {
                "op": TEXT, "axis": TEXT, "size": NUMBER, "fixed": Values(ANYTHING), "provider": TEXT,
                "timing": Optional(MEDIAN), "peak_bytes": FIGURE, "bytes_moved": NUMBER, "not_run": NOT_RUN,
            }
        )
    },
    "linear-head": {
        "results": {
            "accuracy": Maybe(Each({"dtype": TEXT, "perturbation": NUMBER, "way": TEXT, "errors": Each(NUMBER)})),
            "cost": Maybe(
                Each(
                    {
                        "dtype": TEXT, "way": TEXT, "rows": NUMBER, "hidden": NUMBER, "vocabulary": NUMBER,
                        "timing": Optional(MEDIAN), "peak_bytes": FIGURE,
                    }
                )
            ),
        }
    },
    "quality": {
        "settings": {"attack": Values(ANYTHING)},
        "tasks": Values({"title": TEXT, "metrics": Each(TEXT), "figures": Each(TEXT)}),
        "summary": Each(
            {
                "task": TEXT, "mode": TEXT, "method": TEXT, "seeds": Each(ANYTHING), "steps": NUMBER,
                "of_standard": FIGURE, "ms_per_step": NUMBER, "figures": Values(SPREAD),
            }
        ),
        "verdict": Each(TEXT),
    },
    "estimators": {
        "results": Each(
            {
                "estimator": TEXT, "setting": ANYTHING, "cost": FIGURE, "cost_bound": FIGURE, "bias": FIGURE,
                "bias_low": FIGURE, "bias_high": FIGURE, "variance": FIGURE, "batches": FIGURE,
                "unbiased": Optional(FLAG), "changes": Optional(TEXT),
            }
        )
    },
    "pass-costs": {
        "results": Each(
            {
                "shape": TEXT, "fraction": NUMBER, "timings": Values(MEDIAN), "floor_of_standard": NUMBER,
                "bound_at_fraction": NUMBER,
            }
        )
    },
    "memory": {
        "results": Each(
            {
                "method": TEXT, "task": TEXT, "batch": NUMBER, "length": NUMBER, "peak_bytes": FIGURE,
                "of_standard": FIGURE, "activation_bytes": FIGURE, "activations_of_standard": FIGURE,
                "forwards": ANYTHING, "note": Optional(TEXT),
            }
        )
    },
    "accuracy": {
        "results": Each(
            {
                "provider": TEXT, "dtype": TEXT, "classes": NUMBER, "perturbation": NUMBER, "clean": TEXT,
                "rows": NUMBER, "value": FIGURE, "whole": FIGURE, "median": FIGURE, "bounds": Values(NUMBER),
                "exceeded": Each(TEXT),
            }
        )
    },
    "resources": {
        "results": Each(
            {"kernel": TEXT, "architecture": TEXT, "registers": NUMBER, "shared": NUMBER, "spilt": NUMBER}
        )
    },
    "gpu-check": {"stages": Each({"name": TEXT, "outcome": TEXT, "seconds": NUMBER, "detail": TEXT})},
}  # fmt: skip

OLDER_STEP = {
    "results": Each(
        {"task": TEXT, "step": TEXT, "batch": NUMBER, "length": NUMBER, "timing": MEDIAN, "of_standard": FIGURE}
    )
}
"""Whole steps before they had modes, bounds and launches."""


def check(value: Any, form: Any, place: str) -> None:
    """Raises FormError, naming the place, where ``value`` has not the form."""
    if isinstance(form, Optional):
        if value is not None:
            check(value, form.form, place)
    elif isinstance(form, Maybe):
        check(value, form.form, place)
    elif isinstance(form, Each):
        _expect(isinstance(value, list), place, "a list", value)
        for number, element in enumerate(value):
            check(element, form.form, f"{place}[{number}]")
    elif isinstance(form, Values):
        _expect(isinstance(value, Mapping), place, "an object", value)
        for name, element in value.items():
            check(element, form.form, f"{place}.{name}")
    elif isinstance(form, Mapping):
        _expect(isinstance(value, Mapping), place, "an object", value)
        for name, part in form.items():
            if name in value:
                check(value[name], part, f"{place}.{name}" if place else name)
            elif not isinstance(part, Maybe):
                raise FormError(f"{place or 'the file'}: expected the key {name!r}, got {sorted(value)}")
    elif form == TEXT:
        _expect(isinstance(value, str), place, form, value)
    elif form == NUMBER:
        _expect(isinstance(value, (int, float)) and not isinstance(value, bool), place, form, value)
    elif form == FLAG:
        _expect(isinstance(value, bool), place, form, value)


def _expect(right: bool, place: str, expected: str, value: Any) -> None:
    if not right:
        raise FormError(f"{place}: expected {expected}, got {str(value)[:60]!r}")
