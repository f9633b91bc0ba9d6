"""A file's bytes as text: UTF-8 in lines of a bounded length, without NUL."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

Reader = TypeVar("Reader", bound=Callable)

LONGEST_LINE = 1 << 20
"""Characters of a line, line end apart. A longer one is no line of examples but a file of another kind."""

_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""Byte-order marks, the longer ones first."""


class CorpusError(ValueError):
    """A file that cannot be used; its message begins with ``path:line: ``, or ``path: `` where no line is meant."""


def reader_for(path: Path, readers: Mapping[str, Reader]) -> Reader:
    """The reader of files that are called as this one is; ``readers`` are by suffix, ``.csv`` and so on.

    Raises:
        CorpusError: there is none.
    """
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise CorpusError(f"{path}: expected a file called {', '.join(f'*{suffix}' for suffix in readers)}")
    return reader


def read_text(path: Path) -> str:
    """All of a UTF-8 file, without a byte-order mark; line ends are as they are.

    Raises:
        CorpusError: the file cannot be read, is empty, no UTF-8, holds a NUL or a line of more than ``LONGEST_LINE``
            characters.
    """
    data = _read_bytes(path)
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None) or _unmarked(data)
    if encoding is not None:
        raise CorpusError(
            f"{path}: expected UTF-8 text, got {encoding}; convert it: iconv -f {encoding} -t UTF-8 FILE > NEW_FILE"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        raise CorpusError(
            f"{path}:{before.count(10) + 1}: not UTF-8 text, byte {data[error.start]:#04x} "
            f"(number {error.start - before.rfind(10)} of the line)"
        ) from error
    if not text:
        raise CorpusError(f"{path}: expected one example a line, the file is empty")
    if (nul := text.find("\0")) >= 0:
        raise CorpusError(f"{path}:{line_of(text, nul)}: expected text, got a NUL (column {column_of(text, nul)})")
    if len(text) > LONGEST_LINE:
        for number, line in enumerate(text.split("\n"), 1):
            if len(line) > LONGEST_LINE:
                raise CorpusError(
                    f"{path}:{number}: expected a line of at most {LONGEST_LINE} characters, got {len(line)}"
                )
    return text


def text_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file as they are, without a byte-order mark and line ends; quotes mean nothing.

    Raises:
        CorpusError: as of :func:`read_text`.
    """
    lines = read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def line_of(text: str, place: int) -> int:
    """Number of the line that a character is in, from 1."""
    return text.count("\n", 0, place) + 1


def column_of(text: str, place: int) -> int:
    """Number of a character in its line, from 1."""
    return place - text.rfind("\n", 0, place)


def shown(text: str, most: int = 60) -> str:
    """A quotation for a message: quoted, and cut where it is long."""
    return repr(text) if len(text) <= most else f"{text[:most]!r}..."


def _read_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except IsADirectoryError as error:
        raise CorpusError(f"{path}: expected a file, got a directory") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise CorpusError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _unmarked(data: bytes) -> str | None:
    """The encoding of a file without a mark in which every second byte is NUL, as Latin script in UTF-16 has it."""
    head = data[:64]
    halves = head[0::2], head[1::2]
    return "UTF-16" if len(head) >= 4 and any(half.count(0) == len(half) for half in halves) else None
