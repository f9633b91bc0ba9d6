"""What the examples of each way into training start from: the bundled MiniLM, and docstrings that it tells apart."""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from alum_kernels.training.models import bundled_model
from examples.corpora import docstring_classification

LENGTH = 48
"""Tokens of a docstring at most."""


class DocstringTask(NamedTuple):
    """A model that predicts of which package of the standard library a docstring is, and samples to train it on.

    Attributes:
        samples: dicts of ``input_ids``, ``attention_mask`` and ``labels``, not yet padded.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    samples: list[dict]

    def loader(self, size: int) -> DataLoader:
        """Batches of ``size`` samples, padded, in a random order."""
        return DataLoader(
            self.samples,
            size,
            shuffle=True,
            drop_last=True,
            collate_fn=DataCollatorWithPadding(self.tokenizer),
            generator=torch.Generator().manual_seed(0),
        )


def start(count: int = 512, source: str | None = None) -> DocstringTask:
    """The same model, head included, and the same ``count`` samples at every call; ``source`` is another model's."""
    torch.manual_seed(0)
    task = docstring_classification()
    source = source or bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(task.classes)).train()
    texts = [text for (text,) in task.train.texts[:count]]
    encoded = tokenizer(texts, truncation=True, max_length=LENGTH, return_token_type_ids=False)
    rows = zip(encoded["input_ids"], encoded["attention_mask"], task.train.labels, strict=False)
    samples = [{"input_ids": ids, "attention_mask": mask, "labels": label} for ids, mask, label in rows]
    return DocstringTask(model, tokenizer, samples)
