"""Tasks of the GLUE benchmark and named entities, read from files in their published formats or from the Hub.

    CoLA     no header: source, label, mark, sentence           two classes
    SST-2    sentence, label                                    two classes
    RTE      index, sentence1, sentence2, label                 two classes, by name
    MRPC     Quality, #1 ID, #2 ID, #1 String, #2 String        two classes
    STS-B    ..., sentence1, sentence2, score                   a score from 0 to 5
    NER      token<TAB>tag, a blank line ends a sentence        B-, I- and O

Columns are separated by tabs and quotes are literal. Files with a header are read by its names, so that more columns or
another order do no harm.

Sources: Wang et al., arXiv:1804.07461; Ramshaw and Marcus, arXiv:cmp-lg/9505040 (tags).
"""

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from alum_kernels.corpora import CorpusError
from alum_kernels.corpora.text import text_lines
from alum_kernels.training.batches import LabelledText
from alum_kernels.training.hub import hub_splits

CLASSIFICATION, REGRESSION, TAGGING = "classification", "regression", "tagging"
HIGHEST_SCORE = 5.0
TAG = re.compile(r"O|[BI]-\S+")


@dataclass(frozen=True)
class Task:
    """Where a task's examples are, and what it is judged by.

    Attributes:
        name: as on the command line.
        title: as published; also the name of its folder.
        kind: ``CLASSIFICATION``, ``REGRESSION`` or ``TAGGING``.
        metrics: names in :data:`examples.glue_metrics.METRICS`; comparisons of methods go by the first.
        texts, label: columns of the one or two texts, and of the label.
        classes: what the label column may say, by class index.
        columns: names of the columns of files that have no header.
        hub: data set of the Hugging Face Hub, ``name:configuration``; its texts and labels are ``hub_texts`` and
            ``label``.
        dev_files: names that the development file goes by.
        freelb: what the constants of FreeLB call the task.
    """

    name: str
    title: str
    kind: str
    metrics: tuple[str, ...]
    texts: tuple[str, ...] = ()
    label: str = ""
    classes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    hub: str | None = None
    hub_texts: tuple[str, ...] = ()
    dev_files: tuple[str, ...] = ("dev.tsv",)
    freelb: str | None = None


_BINARY = ("0", "1")
_PAIR = ("sentence1", "sentence2")

TASKS = {
    task.name: task
    for task in (
        Task(
            "cola", "CoLA", CLASSIFICATION, ("matthews", "accuracy"), ("sentence",), "label", _BINARY,
            columns=("source", "label", "mark", "sentence"),
            freelb="cola", hub="nyu-mll/glue:cola", hub_texts=("sentence",),
        ),
        Task(
            "rte", "RTE", CLASSIFICATION, ("accuracy",), _PAIR, "label", ("entailment", "not_entailment"),
            freelb="rte", hub="nyu-mll/glue:rte", hub_texts=_PAIR,
        ),
        Task(
            "mrpc", "MRPC", CLASSIFICATION, ("f1", "accuracy"), ("#1 String", "#2 String"), "Quality", _BINARY,
            freelb="mrpc", hub="nyu-mll/glue:mrpc", hub_texts=_PAIR,
        ),
        Task(
            "stsb", "STS-B", REGRESSION, ("pearson", "spearman"), _PAIR, "score",
            freelb="sts-b", hub="nyu-mll/glue:stsb", hub_texts=_PAIR,
        ),
        Task(
            "sst2", "SST-2", CLASSIFICATION, ("accuracy",), ("sentence",), "label", _BINARY,
            freelb="sst-2", hub="nyu-mll/glue:sst2", hub_texts=("sentence",),
        ),
        Task(
            "ner", "ncbi-disease", TAGGING, ("entity_f1", "entity_precision", "entity_recall"),
            dev_files=("devel.tsv", "dev.tsv"),
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class TaggedSentences:
    """Words of sentences, and the index of each word's tag."""

    words: list[tuple[str, ...]]
    tags: list[tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.words)

    def lengths(self) -> list[int]:
        """Characters of each sentence, which tell roughly how many tokens it has."""
        return [sum(map(len, words)) for words in self.words]


Examples = LabelledText | TaggedSentences


@dataclass(frozen=True)
class TaskData:
    """A task with its examples; ``classes`` are the tags of a tagging task and empty for a regression."""

    task: Task
    train: Examples
    dev: Examples
    classes: tuple[str, ...]

    def limited(self, train: int | None = None, dev: int | None = None) -> "TaskData":
        """At most so many examples of each part, drawn at random but always the same; ``dev`` from short to long."""
        train_part = _part(self.train, _drawn(len(self.train), train))
        lengths = self.dev.lengths()
        dev_part = _part(self.dev, sorted(_drawn(len(self.dev), dev), key=lengths.__getitem__))
        return replace(self, train=train_part, dev=dev_part)


def read_task(name: str, data: str | Path) -> TaskData:
    """A task from a folder, or from the Hub where ``data`` is ``"hub"``.

    Args:
        name: of :data:`TASKS`.
        data: folder with ``train.tsv`` and ``dev.tsv``, or one that has such a folder called as the task was published,
            directly or in a folder ``glue``.

    Raises:
        CorpusError: a file, column, row or label that cannot be used, naming the file and the line.
    """
    if name not in TASKS:
        raise CorpusError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    task = TASKS[name]
    if str(data) == "hub":
        return _read_hub(task)
    train, dev = _find_files(task, Path(data))
    return _read_tagged(task, train, dev) if task.kind == TAGGING else _read_labelled(task, train, dev)


def _find_files(task: Task, folder: Path) -> tuple[Path, Path]:
    if not folder.is_dir():
        raise CorpusError(f"{folder}: expected a folder with the files of {task.title}, or hub")
    places = [place for place in (folder / task.title, folder / "glue" / task.title, folder) if place.is_dir()]
    for place in places:
        dev = next((place / name for name in task.dev_files if (place / name).is_file()), None)
        if dev is not None and (place / "train.tsv").is_file():
            return place / "train.tsv", dev
    raise CorpusError(
        f"{folder}: expected train.tsv and {' or '.join(task.dev_files)} in it, in {task.title} or in glue/{task.title}"
    )


def _read_labelled(task: Task, train: Path, dev: Path) -> TaskData:
    return TaskData(task, _labelled_text(task, train), _labelled_text(task, dev), task.classes)


def _labelled_text(task: Task, path: Path) -> LabelledText:
    read_label = _label_reader(task)
    texts, labels = [], []
    for number, row in _rows(path, task):
        empty = next((column for column in task.texts if not row[column].strip()), None)
        if empty is not None:
            raise CorpusError(f"{path}:{number}: column {empty}: expected text, got none")
        texts.append(tuple(row[column] for column in task.texts))
        labels.append(read_label(row[task.label], f"{path}:{number}: column {task.label}"))
    return LabelledText(texts, labels)


def _rows(path: Path, task: Task) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows by column name, with the number of their line."""
    lines = text_lines(path)
    columns, first = list(task.columns), 1
    if not columns:
        columns, first = lines[0].split("\t"), 2
        missing = [column for column in (*task.texts, task.label) if column not in columns]
        if missing:
            raise CorpusError(
                f"{path}:1: expected a header with the columns {', '.join((*task.texts, task.label))}, "
                f"got no {', '.join(missing)} in {lines[0][:100]!r}"
            )
        if len(lines) == 1:
            raise CorpusError(f"{path}:1: expected examples below the header, got none")
    for number, line in enumerate(lines[first - 1 :], first):
        cells = line.split("\t")
        if len(cells) != len(columns):
            raise CorpusError(
                f"{path}:{number}: expected {len(columns)} columns ({', '.join(columns)}), "
                f"got {len(cells)}: {line[:60]!r}"
            )
        yield number, dict(zip(columns, cells, strict=True))


def _label_reader(task: Task) -> Callable[[str, str], int | float]:
    """From what a column says, and where, to a class index or a score."""
    index = {name: number for number, name in enumerate(task.classes)}

    def class_index(text: str, place: str) -> int:
        if text not in index:
            raise CorpusError(f"{place}: expected one of {', '.join(index)}, got {text!r}")
        return index[text]

    def score(text: str, place: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= HIGHEST_SCORE:
            raise CorpusError(f"{place}: expected a number from 0 to {HIGHEST_SCORE:g}, got {text!r}")
        return value

    return score if task.kind == REGRESSION else class_index


class _Sentence(NamedTuple):
    line: int
    words: tuple[str, ...]
    tags: tuple[str, ...]


def _read_tagged(task: Task, train: Path, dev: Path) -> TaskData:
    parts = [list(_sentences(path)) for path in (train, dev)]
    tags = tuple(sorted({tag for sentence in parts[0] for tag in sentence.tags}))
    index = {tag: number for number, tag in enumerate(tags)}
    for sentence in parts[1]:
        for place, tag in enumerate(sentence.tags):
            if tag not in index:
                raise CorpusError(f"{dev}:{sentence.line + place}: tag {tag!r} does not occur in {train}")
    return TaskData(
        task,
        *(
            TaggedSentences(
                [sentence.words for sentence in part],
                [tuple(index[tag] for tag in sentence.tags) for sentence in part],
            )
            for part in parts
        ),
        tags,
    )


def _sentences(path: Path) -> Iterator[_Sentence]:
    """Sentences of an IOB file, with the number of their first line."""
    words: list[str] = []
    tags: list[str] = []
    found = False
    lines = text_lines(path)
    for number, line in enumerate([*lines, ""], 1):
        if not line.strip():
            if words:
                yield _Sentence(number - len(words), tuple(words), tuple(tags))
                found = True
            words, tags = [], []
            continue
        word, *rest = line.split("\t")
        if len(rest) != 1 or not word.strip():
            raise CorpusError(f"{path}:{number}: expected 'token<TAB>tag', got {1 + len(rest)} columns: {line[:60]!r}")
        if not TAG.fullmatch(rest[0]):
            raise CorpusError(f"{path}:{number}: expected a tag O, B-... or I-..., got {rest[0]!r}")
        words.append(word)
        tags.append(rest[0])
    if not found:
        raise CorpusError(f"{path}: expected sentences, got blank lines")


def _read_hub(task: Task) -> TaskData:
    if task.hub is None:
        raise CorpusError(f"--data hub: {task.name} is read from files; pass the folder of its IOB files")
    parts = []
    for split in hub_splits(task.hub):
        wanted = (*task.hub_texts, "label")
        missing = [column for column in wanted if column not in split.features]
        if missing:
            raise CorpusError(
                f"data set {task.hub}: expected columns {', '.join(wanted)}, got no {', '.join(missing)} "
                f"in {', '.join(split.features)}"
            )
        labels = [_hub_label(task, row, f"data set {task.hub}, row {number}") for number, row in enumerate(split)]
        parts.append(LabelledText([tuple(row[column] for column in task.hub_texts) for row in split], labels))
    return TaskData(task, *parts, task.classes)


def _hub_label(task: Task, row: dict, place: str) -> int | float:
    label = row["label"]
    if task.kind == REGRESSION and 0 <= label <= HIGHEST_SCORE:
        return float(label)
    if task.kind == CLASSIFICATION and label in range(len(task.classes)):
        return int(label)
    upper = f"{HIGHEST_SCORE:g}" if task.kind == REGRESSION else len(task.classes) - 1
    raise CorpusError(f"{place}: expected a label from 0 to {upper}, got {label!r}")


def _drawn(available: int, count: int | None) -> Sequence[int]:
    if count is None or count >= available:
        return range(available)
    return random.Random(0).sample(range(available), count)


def _part(examples: Examples, chosen: Sequence[int]) -> Examples:
    def part(values: Sequence) -> list:
        return [values[index] for index in chosen]

    if isinstance(examples, TaggedSentences):
        return TaggedSentences(part(examples.words), part(examples.tags))
    return LabelledText(part(examples.texts), part(examples.labels))
