"""Records of comma-separated values, each with the line that it begins at.

    record = field *("," field)             ends with a line feed, with carriage return and line feed, or with the file
    field  = text without quotes, commas and line ends
           | '"' anything, a quote being written as two '"'

Source: RFC 4180, section 2. (The ``csv`` module takes a quote in the middle of a field for text, and does not say where
an unterminated one began.)
"""

import re
from collections.abc import Iterator
from pathlib import Path

from alum_kernels.corpora.text import CorpusError, column_of, line_of, read_text

_QUOTED = r'"([^"]*(?:""[^"]*)*)"'
_FIELD = re.compile(rf'(?:{_QUOTED}|([^",\r\n]*))(,|\r\n|\n|\Z)')
_WHOLE_QUOTED = re.compile(_QUOTED + '(?!")')
_BARE = re.compile(r'[^",\r\n]*')


def csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of each record. A blank line is a record of one empty field.

    Raises:
        CorpusError: a quote that is not closed, or stands where none may; a carriage return by itself; and as of
            :func:`alum_kernels.corpora.text.read_text`.
    """
    text = read_text(path)
    place, line = 0, 1
    begin, fields = line, []
    while True:
        found = _FIELD.match(text, place)
        if found is None:
            raise _fault(path, text, place)
        quoted, bare, end = found.groups()
        fields.append(bare if quoted is None else quoted.replace('""', '"'))
        line += text.count("\n", place, found.end())
        place = found.end()
        if end == ",":
            continue
        yield begin, fields
        if place == len(text):
            return
        begin, fields = line, []


def _fault(path: Path, text: str, place: int) -> CorpusError:
    """What is wrong with the field at ``place``."""
    whole = _WHOLE_QUOTED.match(text, place)
    if whole is None and text[place] == '"':
        return CorpusError(f"{path}:{line_of(text, place)}: expected a closing quote, got the end of the file")
    after = (whole or _BARE.match(text, place)).end()
    where = f"{path}:{line_of(text, after)}: column {column_of(text, after)}"
    if text[after] == "\r":
        return CorpusError(f"{where}: expected lines to end with a line feed, got a carriage return by itself")
    if whole is not None:
        return CorpusError(f"{where}: expected a comma or the line's end after a closing quote, got {text[after]!r}")
    return CorpusError(f"{where}: expected a field with quotes in it to be quoted, and its quotes to be doubled")
