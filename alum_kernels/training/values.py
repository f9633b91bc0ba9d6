"""Converters of settings: what was written on a command line or in a settings file, as the type that is meant.

A command line has text only; YAML reads ``1e-3`` as text. Each converter takes what came and raises ValueError with
``expected X, got Y``.
"""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

Convert = Callable[[Any], Any]


def parsed(value: Any) -> Any:
    """Text that is a number, a truth value, null or a list becomes that; anything else stays as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        words = {"none": None, "None": None, "True": True, "False": False}
        return words.get(value, value)


def text(value: Any) -> str:
    """A word or a name."""
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"expected text, got {value!r}")


def whole(least: int, most: int = (1 << 63) - 1) -> Convert:
    """An int of at least so much, and at most what fits where it goes."""

    def convert(value: Any) -> int:
        found = parsed(value)
        if isinstance(found, bool) or not isinstance(found, int) or found < least:
            raise ValueError(f"expected a whole number of at least {least}, got {value!r}")
        if found > most:
            raise ValueError(f"expected a whole number of at most {most}, got {value!r}")
        return found

    return convert


def number(least: float = 0.0, most: float = float("inf"), *, above: bool = False) -> Convert:
    """A finite float from ``least`` to ``most``, ``above`` it or not below it."""

    def convert(value: Any) -> float:
        found = parsed(value)
        right = isinstance(found, int | float) and not isinstance(found, bool)
        finite = right and math.isfinite(found)
        if not finite or not (least < found if above else least <= found) or not found <= most:
            bound = f"above {least:g}" if above else f"of at least {least:g}"
            upper = "" if most == float("inf") else f" and at most {most:g}"
            raise ValueError(f"expected a number {bound}{upper}, got {value!r}")
        return float(found)

    return convert


def choice(*options: str) -> Convert:
    """One of some words."""

    def convert(value: Any) -> str:
        if value not in options:
            raise ValueError(f"expected one of {', '.join(options)}, got {value!r}")
        return value

    return convert


def switch(value: Any) -> bool:
    """True or false."""
    found = parsed(value)
    if not isinstance(found, bool):
        raise ValueError(f"expected true or false, got {value!r}")
    return found


def words(value: Any) -> tuple[str, ...]:
    """Some names: a list, or text with commas."""
    found = value.split(",") if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(word, str) and word.strip() for word in found):
        raise ValueError(f"expected names with commas between them, got {value!r}")
    return tuple(word.strip() for word in found)


def shares(value: Any) -> tuple[float, ...]:
    """Some numbers above 0 and at most 1: a list, one number, or text with commas."""
    one_by_one = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    if not one_by_one:
        raise ValueError("expected one or more numbers, got none")
    return tuple(number(0.0, 1.0, above=True)(part.strip() if isinstance(part, str) else part) for part in one_by_one)


def optional(convert: Convert) -> Convert:
    """The same, or nothing."""
    return lambda value: None if parsed(value) is None else convert(value)
