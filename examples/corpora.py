"""Text to train on: what every CPython carries, tab-separated files, and data sets of the Hugging Face Hub."""

import ast
import random
import re
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alum_kernels.corpora import CorpusError
from alum_kernels.training.batches import LabelledText
from alum_kernels.training.data import read_data
from alum_kernels.training.settings import Settings

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
"""Packages of the standard library with enough docstrings to tell them apart by."""

MIN_WORDS = 5
DEV_SHARE = 0.2


@dataclass(frozen=True)
class Classification:
    """A labelled task: training and development texts and what the classes are called."""

    name: str
    train: LabelledText
    dev: LabelledText
    classes: tuple[str, ...]


def documentation_paragraphs(minimum_words: int = 12) -> list[str]:
    """English paragraphs of the language reference that ``help()`` prints (``pydoc_data.topics``)."""
    from pydoc_data.topics import topics

    paragraphs = []
    for topic in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            text = " ".join(paragraph.split())
            if len(text.split()) >= minimum_words and not text.startswith((">>>", "|", "+-", "***")):
                paragraphs.append(text)
    return paragraphs


def docstring_classification(seed: int = 0) -> Classification:
    """Which package of the standard library a docstring belongs to.

    Docstrings are read from the sources without importing them; names of the packages are blanked, so that the label
    is not written in the text. A fifth, drawn at random, is for development.
    """
    library = Path(sysconfig.get_path("stdlib"))
    found: list[tuple[str, int]] = []
    seen: set[str] = set()
    hidden = re.compile("|".join(PACKAGES), re.IGNORECASE)
    for label, package in enumerate(PACKAGES):
        for path in sorted((library / package).rglob("*.py")):
            for text in _docstrings(path):
                text = hidden.sub("it", text)
                if len(text.split()) >= MIN_WORDS and text not in seen:
                    seen.add(text)
                    found.append((text, label))
    if not found:
        raise CorpusError(f"{library}: no sources of the standard library with docstrings in them")
    random.Random(seed).shuffle(found)
    cut = int(len(found) * DEV_SHARE)

    def part(rows: Sequence[tuple[str, int]]) -> LabelledText:
        return LabelledText([(text,) for text, _ in rows], [label for _, label in rows])

    version = ".".join(map(str, sys.version_info[:2]))
    return Classification(f"docstrings of Python {version}", part(found[cut:]), part(found[:cut]), PACKAGES)


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # files that test how broken source is met
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [" ".join(text.split()) for text in texts if text]


def given_classification(train: str, dev: str | None = None) -> Classification:
    """A task in files (.tsv, .csv, .jsonl), or in ``hub:NAME``, which has both parts, as ``alum-kernels train`` has it.

    Raises:
        CorpusError, TrainingError: a file, row, column or label that cannot be used; files are named with the line.
    """
    data = read_data(Settings.of({"train": train, "dev": dev, "output": "unused"}))
    return Classification(Path(train).stem, data.train, data.dev, data.classes)
