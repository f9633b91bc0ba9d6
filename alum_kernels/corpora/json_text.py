"""JSON as the standard has it: no key twice, no NaN, no half of a character; and files with one object a line."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from alum_kernels.corpora.text import CorpusError, shown, text_lines

NO_CHARACTER = re.compile("[\0\ud800-\udfff]")
"""What an escape can write and no text can hold: NUL, and either half of a pair of surrogates."""


class DuplicateKeyError(ValueError):
    """An object that has a key twice, ``key``."""

    def __init__(self, key: str) -> None:
        super().__init__(f"expected every key once, got {shown(key)} twice")
        self.key = key


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        json.JSONDecodeError: it is none.
        DuplicateKeyError: a key stands twice in an object.
        ValueError: a number, or a depth, that Python cannot hold.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("expected JSON that nests less deeply") from error


def json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of a file with one JSON object a line.

    Raises:
        CorpusError: a line that holds no object, a blank one included; and as of
            :func:`alum_kernels.corpora.text.text_lines`.
    """
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            raise CorpusError(f"{path}:{number}: expected a JSON object, got a blank line")
        try:
            value = parse_json(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{path}:{number}: expected a JSON object, column {error.colno}: {error.msg}") from error
        except ValueError as error:
            raise CorpusError(f"{path}:{number}: {error}") from error
        if not isinstance(value, dict):
            raise CorpusError(f"{path}:{number}: expected a JSON object, got {kind_of(value)}: {shown(line)}")
        yield number, value


def text_of(value: Any, name: str, place: str) -> str:
    """The string that the field ``name`` of an object holds.

    Raises:
        CorpusError: it holds something else, or what is no character.
    """
    if not isinstance(value, str):
        raise CorpusError(f"{place}: field {name}: expected a string, got {kind_of(value)}")
    if (found := NO_CHARACTER.search(value)) is not None:
        raise CorpusError(f"{place}: field {name}: expected characters, got \\u{ord(found[0]):04x}")
    return value


def kind_of(value: Any) -> str:
    """What JSON calls it."""
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    name = kinds[type(value)]
    return f"an {name}" if name[0] in "ao" else f"a {name}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise DuplicateKeyError(key)
        found[key] = value
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"expected a JSON number, got {constant}")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"expected a number below 1.8e308, got {shown(digits)}")
    return value
