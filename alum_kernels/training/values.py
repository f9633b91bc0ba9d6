"""Converters of settings: what was written on a command line or in a settings file, as the type that is meant.

A command line has text only; YAML reads ``1e-3`` as text. Each converter takes what came and raises ValueError with
``expected X, got Y``.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
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


def path(value: Any) -> str:
    """The name of a file or a folder, or of something elsewhere."""
    found = text(value)
    try:
        found.encode()
    except UnicodeEncodeError as error:  # libraries take UTF-8 only; a shell's other bytes come as surrogates
        raise ValueError(f"expected a name in UTF-8, which a locale such as C.UTF-8 reads, got {value!r}") from error
    if "\0" in found:
        raise ValueError(f"expected a name without NUL, got {value!r}")
    return found


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


def constant(value: Any) -> Any:
    """A constant of a method, of any type; its whole numbers fit 64 bits."""
    found = parsed(value)
    try:
        fits = all(-(1 << 63) <= number < 1 << 63 for number in _whole_numbers(found))
    except RecursionError as error:  # a YAML list may have itself in it
        raise ValueError("expected lists that nest less deeply") from error
    if not fits:
        raise ValueError(f"expected whole numbers of 64 bits, got {value!r}")
    return found


def _whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _whole_numbers(part)


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


def columns(value: Any) -> tuple[str, ...]:
    """Names of the columns of the text, two at most."""
    found = words(value)
    if len(found) > 2:
        raise ValueError(f"expected one or two names, got {', '.join(found)}")
    return found


def shares(value: Any) -> tuple[float, ...]:
    """Some numbers above 0 and at most 1: a list, one number, or text with commas."""
    one_by_one = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    if not one_by_one:
        raise ValueError("expected one or more numbers, got none")
    return tuple(number(0.0, 1.0, above=True)(part.strip() if isinstance(part, str) else part) for part in one_by_one)


def optional(convert: Convert) -> Convert:
    """The same, or nothing."""
    return lambda value: None if parsed(value) is None else convert(value)
