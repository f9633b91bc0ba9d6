"""A tokenizer whose words are known, and samples of them."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{index}" for index in range(95)]


def new_tokenizer(words=(*SPECIAL, *WORDS)):
    return transformers.BertTokenizer(vocab={word: place for place, word in enumerate(words)})


def samples_of(tokenizer, count: int, length: int = 62, seed: int = 0) -> list[dict]:
    """``count`` sequences of ``length`` words between [CLS] and [SEP]."""
    drawn = torch.randint(len(SPECIAL), len(tokenizer), (count, length), generator=torch.Generator().manual_seed(seed))
    return [
        {"input_ids": [tokenizer.cls_token_id, *row, tokenizer.sep_token_id], "next_sentence_label": place % 2}
        for place, row in enumerate(drawn.tolist())
    ]
