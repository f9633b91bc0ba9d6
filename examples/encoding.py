"""From the examples of a task to batches of tokens.

A word of a tagging task may become several pieces: the first one carries the word's tag, the others, special tokens and
padding are labelled -100 and count nowhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from examples.glue_tasks import TaggedSentences, TaskData
from examples.training import SAMPLE_KEY, Batch, classification_batches, ordered_batches, take

NOT_COUNTED = -100


@dataclass(frozen=True)
class DevSet:
    """Development examples in order.

    Attributes:
        batches: with labels.
        words: of a tagging task, for each batch and sentence the indices of the words that its counted positions stand
            for, from left to right; words cut off at the end are missing. Empty for other tasks.
    """

    batches: list[Batch]
    words: list[list[list[int]]]


def training_batches(tokenizer, data: TaskData, *, steps: int, size: int, length: int, seed: int) -> list[Batch]:
    """The first ``steps`` batches in the random order of a seed: with more steps, the same ones come first.

    Each says by ``SAMPLE_KEY`` which examples it is of.

    Raises:
        ValueError: there are fewer than ``size`` examples.
    """
    if len(data.train) < size:
        raise ValueError(
            f"size: expected at most the {len(data.train)} training examples of {data.task.name}, got {size}"
        )
    order = {"size": size, "generator": torch.Generator().manual_seed(seed), "lengths": data.train.lengths()}
    if not isinstance(data.train, TaggedSentences):
        return take(classification_batches(tokenizer, data.train, length=length, indexed=True, **order), steps)
    sentences = data.train

    def encode(chosen: list[int]) -> Batch:
        return {**encode_sentences(tokenizer, sentences, chosen, length)[0], SAMPLE_KEY: torch.tensor(chosen)}

    return take(ordered_batches(len(sentences), encode, **order), steps)


def dev_set(tokenizer, data: TaskData, *, size: int, length: int) -> DevSet:
    if not isinstance(data.dev, TaggedSentences):
        return DevSet(list(classification_batches(tokenizer, data.dev, size=size, length=length)), [])
    groups = torch.arange(len(data.dev)).split(size)
    encoded = [encode_sentences(tokenizer, data.dev, group.tolist(), length) for group in groups]
    return DevSet([batch for batch, _ in encoded], [words for _, words in encoded])


def encode_sentences(
    tokenizer, sentences: TaggedSentences, chosen: Sequence[int], length: int
) -> tuple[Batch, list[list[int]]]:
    """One padded batch of the chosen sentences, and the words that its counted positions stand for (see ``DevSet``).

    Raises:
        ValueError: the tokenizer cannot say which word a piece is of.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer: expected a fast one, which knows the word of a piece, got {type(tokenizer).__name__}"
        )
    encoded = tokenizer(
        [list(sentences.words[index]) for index in chosen],
        is_split_into_words=True,
        truncation=True,
        max_length=length,
        padding=True,
        return_tensors="pt",
    )
    labels = torch.full_like(encoded["input_ids"], NOT_COUNTED)
    words: list[list[int]] = []
    for row, index in enumerate(chosen):
        counted: list[int] = []
        for position, word in enumerate(encoded.word_ids(row)):
            if word is not None and word not in counted[-1:]:
                labels[row, position] = sentences.tags[index][word]
                counted.append(word)
        words.append(counted)
    return {**encoded, "labels": labels}, words
