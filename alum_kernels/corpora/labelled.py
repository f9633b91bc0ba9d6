"""Labelled texts from a table: tab-separated, comma-separated, or one JSON object a line."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alum_kernels.corpora.comma_separated import csv_records
from alum_kernels.corpora.json_text import json_objects, kind_of, text_of
from alum_kernels.corpora.text import CorpusError, reader_for, shown, text_lines

TEXT_COLUMNS = (("text",), ("sentence",), ("sentence1", "sentence2"))
"""What the columns of the text may be called where nobody names them; the first of these that is there."""

LABEL_COLUMN = "label"

_KNOWN = {LABEL_COLUMN, *(name for names in TEXT_COLUMNS for name in names)}


@dataclass(frozen=True)
class Labelled:
    """Texts, or pairs of them, each with its label as the file says it.

    Attributes:
        texts: of each example, one or two.
        labels: not empty, without white space around them.
        places: ``file:line`` that each example begins at, for messages.
    """

    texts: list[tuple[str, ...]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, texts: tuple[str, ...], label: str, place: str) -> None:
        """One more example.

        Raises:
            CorpusError: its label, or its only or first text, is blank.
        """
        if not label.strip():
            raise CorpusError(f"{place}: expected a label, got none")
        if not texts[0].strip():
            raise CorpusError(f"{place}: expected text, got none")
        self.texts.append(texts)
        self.labels.append(label.strip())
        self.places.append(place)


def read_labelled(path: Path, *, text: tuple[str, ...] = (), label: str = "") -> Labelled:
    r"""The examples of a file, whose name says what it is.

        *.tsv     columns apart by tabs; quotes are literal. The first line is a header if columns are named here or if
                  it has one of the default names; otherwise every line is label<TAB>text or label<TAB>text<TAB>text
        *.csv     RFC 4180, with a header: commas, quotes and line ends inside quotes
        *.jsonl   one object a line; a label may be a string, a number or a boolean

    Args:
        path: of a UTF-8 file; a byte-order mark is accepted.
        text: names of the one or two columns (fields) of the text; () takes ``text``, else ``sentence``, else
            ``sentence1`` and ``sentence2``.
        label: name of the column of the label; "" takes ``label``.

    Raises:
        CorpusError: the file, a column or a row that cannot be used; the message begins with the path and, where there
            is one, the line.
        ValueError: more than two columns of text.

    Example:
        >>> import pathlib, tempfile
        >>> from alum_kernels.corpora import read_labelled
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "train.csv")
        ...     _ = path.write_text('text,label\n"a film, and a good one",1\n')
        ...     found = read_labelled(path)
        >>> found.texts, found.labels
        ([('a film, and a good one',)], ['1'])
    """
    path = Path(path)
    if isinstance(text, str) or len(text) > 2:
        raise ValueError(f"text: expected a tuple of one or two names, got {text!r}")
    reader = reader_for(path, {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_objects})
    return reader(path, tuple(text), label)


def _read_tsv(path: Path, text: tuple[str, ...], label: str) -> Labelled:
    rows = _tab_separated(path)
    first = next(rows)
    if text or label or _KNOWN.intersection(first[1]):
        return _read_rows(path, first[1], rows, text, label)
    found = Labelled()
    width = len(first[1])
    if width not in (2, 3):
        raise CorpusError(
            f"{path}:1: expected a header with the columns {LABEL_COLUMN} and text, sentence, or sentence1 and "
            f"sentence2, or 'label<TAB>text' or 'label<TAB>text<TAB>text', got {_listed(first[1])}"
        )
    for number, cells in (first, *rows):
        _check_width(path, number, cells, width, "as the first line")
        found.add(tuple(cells[1:]), cells[0], f"{path}:{number}")
    return found


def _tab_separated(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            raise CorpusError(f"{path}:{number}: expected an example, got a blank line")
        if "\r" in line:
            raise CorpusError(
                f"{path}:{number}: column {line.index(chr(13)) + 1}: expected lines to end with a line feed, got a "
                "carriage return by itself"
            )
        yield number, line.split("\t")


def _read_csv(path: Path, text: tuple[str, ...], label: str) -> Labelled:
    records = csv_records(path)
    _, header = next(records)
    return _read_rows(path, header, records, text, label)


def _read_rows(
    path: Path, header: list[str], rows: Iterator[tuple[int, list[str]]], text: tuple[str, ...], label: str
) -> Labelled:
    """The rows below a header."""
    twice = next((name for index, name in enumerate(header) if name in header[:index]), None)
    if twice is not None:
        raise CorpusError(f"{path}:1: expected every column once, got {shown(twice)} twice")
    columns, label = _columns(f"{path}:1", header, text, label)
    found = Labelled()
    for number, cells in rows:
        if cells == [""]:
            raise CorpusError(f"{path}:{number}: expected an example, got a blank line")
        _check_width(path, number, cells, len(header), _listed(header))
        row = dict(zip(header, cells, strict=True))
        found.add(tuple(row[name] for name in columns), row[label], f"{path}:{number}")
    if not found:
        raise CorpusError(f"{path}:1: expected examples below the header, got none")
    return found


def _read_objects(path: Path, text: tuple[str, ...], label: str) -> Labelled:
    found = Labelled()
    for number, value in json_objects(path):
        place = f"{path}:{number}"
        # the first object decides for all which of the default names are meant
        text, label = _columns(place, list(value), text, label)
        found.add(
            tuple(text_of(value[name], name, place) for name in text), _label_of(value[label], label, place), place
        )
    return found


def _label_of(value: Any, name: str, place: str) -> str:
    if value is None or isinstance(value, list | dict):
        raise CorpusError(f"{place}: field {name}: expected a label, got {kind_of(value)}")
    return text_of(value, name, place) if isinstance(value, str) else json.dumps(value)


def _columns(place: str, there: Sequence[str], text: tuple[str, ...], label: str) -> tuple[tuple[str, ...], str]:
    """Names of the columns to read, those of the text and that of the label."""
    label = label or LABEL_COLUMN
    if not text:
        text = next((names for names in TEXT_COLUMNS if set(names) <= set(there)), ())
    missing = [name for name in (*text, label) if name not in there]
    if not text:
        missing.insert(0, "text, sentence, or sentence1 and sentence2")
    if missing:
        raise CorpusError(f"{place}: expected a column {', and '.join(missing)}, got {_listed(there)}")
    return text, label


def _check_width(path: Path, number: int, cells: list[str], width: int, names: str) -> None:
    if len(cells) != width:
        start = shown(" ".join(cells))
        raise CorpusError(f"{path}:{number}: expected {width} columns ({names}), got {len(cells)}: {start}")


def _listed(names: Sequence[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(shown(name, 30) for name in names[:most]) or "none") + more
