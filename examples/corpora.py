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
from alum_kernels.corpora.text import text_lines

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
"""Packages of the standard library with enough docstrings to tell them apart by."""

MIN_WORDS = 5
DEV_SHARE = 0.2


@dataclass(frozen=True)
class LabelledText:
    """Sentences, or pairs of them, with class indices, or with scores where the task is a regression."""

    texts: list[tuple[str, ...]]
    labels: list[int] | list[float]

    def __len__(self) -> int:
        return len(self.texts)

    def lengths(self) -> list[int]:
        """Characters of each example, which tell roughly how many tokens it has."""
        return [sum(map(len, texts)) for texts in self.texts]


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


def tsv_classification(train: Path, dev: Path) -> Classification:
    """A task in two files of lines ``label<TAB>text`` or ``label<TAB>text<TAB>second text``; quotes are literal.

    Raises:
        CorpusError: a file or row that cannot be used, naming the file and the line.
    """
    rows = {path: _read_tsv(path) for path in (train, dev)}
    classes = tuple(sorted({label for label, _ in rows[train]}))
    if len(classes) < 2:
        raise CorpusError(f"{train}: expected at least two different labels, got {', '.join(classes)}")
    index = {label: number for number, label in enumerate(classes)}
    for number, (label, _) in enumerate(rows[dev], 1):
        if label not in index:
            raise CorpusError(f"{dev}:{number}: label {label!r} does not occur in {train}")
    parts = [
        LabelledText([texts for _, texts in rows[path]], [index[label] for label, _ in rows[path]])
        for path in (train, dev)
    ]
    return Classification(train.stem, *parts, classes)


def _read_tsv(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    lines = text_lines(path)
    rows = []
    for number, line in enumerate(lines, 1):
        label, *texts = line.split("\t")
        if len(texts) not in (1, 2) or not label.strip() or not texts[0].strip():
            raise CorpusError(
                f"{path}:{number}: expected 'label<TAB>text' or 'label<TAB>text<TAB>second text', "
                f"got {1 + len(texts)} columns: {line[:60]!r}"
            )
        rows.append((label.strip(), tuple(texts)))
    return rows


def hub_classification(name: str) -> Classification:
    """A data set of the Hugging Face Hub, ``name`` or ``name/configuration`` after a colon (``glue:cola``).

    The label is the column of that name; the text is the first one or two columns of strings.

    Raises:
        CorpusError: the package ``datasets`` is missing, or the data set has no such columns or cannot be had.
    """
    train, dev = hub_splits(name)
    features = train.features
    texts = [column for column, feature in features.items() if getattr(feature, "dtype", "") == "string"][:2]
    if "label" not in features or not texts:
        raise CorpusError(f"data set {name}: expected a column label and one of strings, got {', '.join(features)}")
    classes = getattr(features["label"], "names", None) or sorted(set(train["label"]))
    index = {value: number for number, value in enumerate(sorted(set(train["label"])))}

    def part(split) -> LabelledText:
        rows = [row for row in split if row["label"] in index]
        return LabelledText(
            [tuple(row[column] for column in texts) for row in rows], [index[row["label"]] for row in rows]
        )

    return Classification(name, part(train), part(dev), tuple(map(str, classes)))


def hub_splits(name: str) -> tuple:
    """The training and the development split of a data set of the Hub, ``name`` or ``name:configuration``.

    Raises:
        CorpusError: the package ``datasets`` is missing, the data set cannot be had, or it has no such splits.
    """
    try:
        import datasets
    except ImportError as error:
        raise CorpusError("a Hub data set needs the package datasets: pip install 'alum-kernels[hub]'") from error
    repository, _, configuration = name.partition(":")
    try:
        loaded = datasets.load_dataset(repository, configuration or None)
    except Exception as error:
        raise CorpusError(f"data set {name}: {error}") from error
    dev_name = next((split for split in ("validation", "dev", "test") if split in loaded), None)
    if "train" not in loaded or dev_name is None:
        raise CorpusError(f"data set {name}: expected splits train and validation or test, got {', '.join(loaded)}")
    return loaded["train"], loaded[dev_name]
