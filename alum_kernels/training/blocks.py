"""Running text as blocks of one length, for language models."""

from collections.abc import Sequence
from typing import Any

import torch

from alum_kernels.training.batches import Batch

HELD_OUT_SHARE = 0.15
"""Masked share of held-out text."""


def masked_blocks(tokenizer: Any, paragraphs: Sequence[str], length: int) -> list[list[int]]:
    """Blocks of ``length`` tokens that begin and end as one sequence of the model; paragraphs end with a separator.

    The model is of BERT's kind: its tokenizer has a token that begins and one that ends a sequence.
    """
    stream = _stream(tokenizer, paragraphs, tokenizer.sep_token_id)
    inside = length - 2
    return [
        [tokenizer.cls_token_id, *stream[start : start + inside], tokenizer.sep_token_id]
        for start in range(0, len(stream) - inside, inside)
    ]


def causal_blocks(tokenizer: Any, paragraphs: Sequence[str], length: int) -> list[list[int]]:
    """Blocks of ``length`` tokens; paragraphs end with the token that ends a text, where the tokenizer has one."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    stream = _stream(tokenizer, paragraphs, end)
    return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]


def _stream(tokenizer: Any, paragraphs: Sequence[str], end: int | None) -> list[int]:
    tokens = tokenizer(list(paragraphs), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [token for paragraph in tokens for token in (*paragraph, *([] if end is None else [end]))]


def causal_batch(blocks: Sequence[Sequence[int]]) -> Batch:
    """A batch of blocks that are their own labels; the model shifts them."""
    ids = torch.tensor(blocks)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
