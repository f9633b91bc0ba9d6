"""Labelled texts from files."""

import json
from dataclasses import dataclass
from pathlib import Path

from alum_kernels.corpora.errors import CorpusError
from alum_kernels.corpora.lines import lines_of


@dataclass(frozen=True)
class Labelled:
    """Texts, their labels, and the place of each as ``file:line``."""

    texts: list[tuple[str, ...]]
    labels: list[str]
    places: list[str]


def read_labelled(path: Path, *, text: tuple[str, ...] = (), label: str = "") -> Labelled:
    """Examples of a file, ``label<TAB>text[<TAB>text]`` or a JSON object a line.

    Raises:
        CorpusError: a file or line that cannot be used.
    """
    found = Labelled([], [], [])
    for number, line in enumerate(lines_of(path), 1):
        if path.suffix == ".jsonl":
            row = json.loads(line)
            found.texts.append(tuple(str(row[name]) for name in text or ("text",)))
            found.labels.append(str(row[label or "label"]))
        else:
            first, *texts = line.split("\t")
            if len(texts) not in (1, 2):
                raise CorpusError(f"{path}:{number}: expected 'label<TAB>text[<TAB>text]', {1 + len(texts)} columns")
            found.texts.append(tuple(texts))
            found.labels.append(first)
        found.places.append(f"{path}:{number}")
    return found
