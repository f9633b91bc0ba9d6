"""The samples of a run: read, checked against the task, and made into batches."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alum_kernels.corpora import Labelled, read_labelled, read_paragraphs
from alum_kernels.training.batches import Batch, LabelledText, encode_texts
from alum_kernels.training.blocks import HELD_OUT_SHARE, causal_batch, causal_blocks, masked_blocks
from alum_kernels.training.errors import TrainingError
from alum_kernels.training.hub import HUB, hub_labelled, hub_paragraphs
from alum_kernels.training.settings import CLASSIFICATION, LABELLED, MASKED_LM, REGRESSION, Settings


class Moment(NamedTuple):
    """Where in the training a batch is made: optimizer steps made, of how many, and the epoch."""

    step: int
    total: int
    epoch: int


@dataclass(frozen=True)
class Samples:
    """Samples that become batches.

    Attributes:
        count: of them.
        lengths: of each, in any unit; None where all are of one length.
        encode: the batch of some of them, at a moment of the training.
    """

    count: int
    lengths: list[int] | None
    encode: Callable[[Sequence[int], Moment], Batch]


@dataclass(frozen=True)
class RawData:
    """What the files say.

    Attributes:
        train, dev: labelled texts or paragraphs; ``dev`` None where there is none.
        classes: names of the classes, in order; empty for other tasks.
        fingerprints: of ``train`` and ``dev``: equal exactly where their content is.
    """

    train: LabelledText | list[str]
    dev: LabelledText | list[str] | None
    classes: tuple[str, ...]
    fingerprints: dict[str, str | None]


def read_data(settings: Settings) -> RawData:
    """Read both parts.

    Raises:
        TrainingError, CorpusError: something that cannot be used; files are named with the line.
    """
    read = _read_labelled if settings.task in LABELLED else _read_paragraphs
    train = read(settings, settings.train, "train")
    from_hub = settings.dev is None and settings.train.startswith(HUB)
    dev = read(settings, settings.train, "dev") if from_hub else None
    if settings.dev is not None:
        dev = read_held_out(settings)
    fingerprints = {"train": _fingerprint(train), "dev": None if dev is None else _fingerprint(dev)}
    if settings.task not in LABELLED:
        return RawData(train, dev, (), fingerprints)
    classes: tuple[str, ...] = ()
    if settings.task == CLASSIFICATION:
        classes = tuple(sorted(set(train.labels)))
        if len(classes) < 2:
            raise TrainingError(f"{settings.train}: expected at least two different labels, got {', '.join(classes)}")
    parts = [None if part is None else numbered(part, classes, settings.task) for part in (train, dev)]
    return RawData(*parts, classes, fingerprints)


def read_held_out(settings: Settings) -> Labelled | list[str]:
    """What ``settings.dev`` says, as it stands there.

    Raises:
        CorpusError: it cannot be read.
    """
    read = _read_labelled if settings.task in LABELLED else _read_paragraphs
    return read(settings, settings.dev, "dev")


def _read_labelled(settings: Settings, source: str, part: str) -> Labelled:
    if source.startswith(HUB):
        return hub_labelled(source, part, settings.text, settings.label)
    return read_labelled(Path(source), text=settings.text, label=settings.label)


def _read_paragraphs(settings: Settings, source: str, part: str) -> list[str]:
    return hub_paragraphs(source, part, settings.text) if source.startswith(HUB) else read_paragraphs(Path(source))


def numbered(data: Labelled, classes: Sequence[str], task: str) -> LabelledText:
    """Texts with the number of their class, or with their score.

    Raises:
        TrainingError: a label that is none of the classes, or no finite number, by its place.
    """
    index = {name: number for number, name in enumerate(classes)}
    labels: list[Any] = []
    for label, place in zip(data.labels, data.places, strict=True):
        if task == REGRESSION:
            labels.append(_score(label, place))
        elif label in index:
            labels.append(index[label])
        else:
            raise TrainingError(f"{place}: expected a label of {', '.join(classes)}, got {label!r}")
    widths = {len(texts) for texts in data.texts}
    if len(widths) > 1:
        raise TrainingError(f"{data.places[0]}: expected one text in every example or two in every one, got both")
    return LabelledText(data.texts, labels)


def _score(label: str, place: str) -> float:
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise TrainingError(f"{place}: expected a number as label, got {label!r}")
    return score


def samples_of(content: LabelledText | list[str], settings: Settings, tokenizer: Any, *, held_out: bool) -> Samples:
    """Samples that the tokenizer encodes; held-out text is masked at one share throughout.

    Raises:
        TrainingError: the text is shorter than a block.
    """
    if isinstance(content, LabelledText):

        def encode_labelled(chosen: Sequence[int], moment: Moment) -> Batch:
            return encode_texts(tokenizer, content, chosen, settings.length)

        return Samples(len(content), content.lengths(), encode_labelled)
    make = masked_blocks if settings.task == MASKED_LM else causal_blocks
    if settings.task == MASKED_LM and None in (tokenizer.mask_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id):
        raise TrainingError("model: expected a tokenizer with a mask, a first and a last token for task masked-lm")
    blocks = make(tokenizer, content, settings.length)
    if not blocks:
        raise TrainingError(
            f"{settings.dev if held_out else settings.train}: expected text of at least length {settings.length}"
        )
    if settings.task != MASKED_LM:
        return Samples(len(blocks), None, lambda chosen, moment: causal_batch([blocks[index] for index in chosen]))
    from alum_kernels.integrations.masking import ProgressiveMaskingCollator

    collate = ProgressiveMaskingCollator(
        tokenizer, (HELD_OUT_SHARE,) if held_out else settings.mask_shares, seed=settings.seed
    )

    def encode_masked(chosen: Sequence[int], moment: Moment) -> Batch:
        collate.set_progress(*moment)  # masks are a function of it, of the seed and of the tokens
        batch = collate([{"input_ids": blocks[index]} for index in chosen])
        return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}

    return Samples(len(blocks), None, encode_masked)


def _fingerprint(content: Labelled | list[str]) -> str:
    digest = hashlib.sha256()
    rows = zip(content.texts, content.labels, strict=True) if isinstance(content, Labelled) else content
    for row in rows:
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()
