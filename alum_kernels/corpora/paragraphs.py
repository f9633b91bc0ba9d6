"""Unlabelled text: paragraphs of a plain file, or a field of JSON objects."""

from pathlib import Path

from alum_kernels.corpora.json_text import json_objects, text_of
from alum_kernels.corpora.text import CorpusError, reader_for, text_lines

TEXT_FIELD = "text"


def read_paragraphs(path: Path) -> list[str]:
    """The paragraphs of a file, in their order.

        *.txt     blank lines are between paragraphs; a paragraph's lines are joined, white space being one space
        *.jsonl   one object a line; the string of its field ``text``, as it is

    Raises:
        CorpusError: the file or a line that cannot be used; the message begins with the path and, where there is one,
            the line.
    """
    path = Path(path)
    return reader_for(path, {".txt": _plain, ".jsonl": _of_objects})(path)


def _plain(path: Path) -> list[str]:
    paragraphs: list[list[str]] = [[]]
    for line in text_lines(path):
        words = line.split()
        if words:
            paragraphs[-1].extend(words)
        elif paragraphs[-1]:
            paragraphs.append([])
    if not paragraphs[0]:
        raise CorpusError(f"{path}: expected paragraphs, got blank lines")
    return [" ".join(words) for words in paragraphs if words]


def _of_objects(path: Path) -> list[str]:
    found = []
    for number, value in json_objects(path):
        place = f"{path}:{number}"
        if TEXT_FIELD not in value:
            listed = ", ".join(map(repr, value)) or "none"
            raise CorpusError(f"{place}: expected a field {TEXT_FIELD!r}, got {listed}")
        text = text_of(value[TEXT_FIELD], TEXT_FIELD, place)
        if not text.strip():
            raise CorpusError(f"{place}: field {TEXT_FIELD}: expected text, got none")
        found.append(text)
    return found
