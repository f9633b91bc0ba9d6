"""Pairs of text segments for next-sentence prediction, the second task of BERT's pre-training.

All tokens of a corpus lie in one flat tensor, sentence after sentence. A segment is a run of sentences of one document,
trimmed at its ends, hence a slice of that tensor, and a pair is five integers:

    tokens   | doc 0: s0 s1 s2 s3 | doc 1: s0 s1 ...
                    [--A--][-B-]                         label 0: B follows A
                    [--A--]              [-B-]           label 1: B is from another document

so that pairs are planned on sentence boundaries alone, and built when they are asked for.
"""

import copy
import random
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.utils.data import Dataset

try:
    from transformers import PreTrainedTokenizerBase
except ImportError as error:
    raise ImportError(
        "alum_kernels.integrations.next_sentence: expected transformers to be installed; "
        "pip install 'alum-kernels[transformers]'"
    ) from error

SENTENCES_AT_ONCE = 4096
"""Sentences, at least, that the tokenizer gets in one call."""


class NextSentencePairs(Dataset):
    """Documents as pairs of segments, of which the second follows the first in half of the cases.

    A document is cut into chunks of as many sentences as fill a pair, two at least, and each chunk is split at a random
    sentence boundary. A fair coin then keeps its second part (label 0), or puts a run of sentences from a random place
    of another document there (label 1), in which case the document is taken up again after the split. A pair that is
    too long loses tokens of its longer segment, at either end. A last sentence that nothing follows begins no pair, so
    the labels are as fair as the coin.

    Pairs come in the order of the documents: shuffle them, as the Trainer does. To see other pairs in later epochs,
    chain the data sets of several seeds, see :meth:`redrawn`.

    Args:
        documents: each a sequence of sentences, as strings; two documents or more, one of them with two sentences or
            more. Sentences and documents that hold no tokens are left out. Tokens of sentences are joined as they are:
            a tokenizer that marks spaces, as BERT's does not, needs sentences that begin with theirs.
        tokenizer: as well as the tokens, it says which special tokens and token types go with a pair.
        max_length: tokens of a pair at most, special tokens included.
        short_share: share of the pairs that are planned for a random smaller length.
        seed: of all draws; the same documents and seed give the same pairs.

    Returns:
        A map-style data set of dicts, for ``BertForPreTraining``: lists ``input_ids``, ``token_type_ids`` and
        ``attention_mask`` of at most ``max_length`` integers, not padded, and the integer ``next_sentence_label``.

    Raises:
        TypeError: a document or sentence of another type.
        ValueError: fewer than two documents, none with two sentences, a ``max_length`` without room for a token in
            each segment, a share outside [0, 1], or a tokenizer without special tokens before and between segments.

    Source:
        Devlin et al. 2019, arXiv:1810.04805, section 3.1 and appendix A.2, and the code of that paper.

    Example:
        >>> import transformers
        >>> from alum_kernels.integrations.next_sentence import NextSentencePairs
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
        >>> tokenizer = transformers.BertTokenizer(vocab={word: place for place, word in enumerate(words)})
        >>> pairs = NextSentencePairs([["a b", "c d"], ["e f", "g h"]], tokenizer, max_length=7, seed=3)
        >>> for pair in pairs:
        ...     print(tokenizer.decode(pair["input_ids"]), pair["token_type_ids"], pair["next_sentence_label"])
        [CLS] a b [SEP] c d [SEP] [0, 0, 0, 0, 1, 1, 1] 0
        [CLS] e f [SEP] a b [SEP] [0, 0, 0, 0, 1, 1, 1] 1
    """

    def __init__(
        self,
        documents: Iterable[Sequence[str]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 512,
        short_share: float = 0.1,
        seed: int = 0,
    ) -> None:
        if not 0 <= short_share <= 1:
            raise ValueError(f"short_share: expected a number in [0, 1], got {short_share}")
        self._tokens, self._sentences, self._documents = _tokenized(documents, tokenizer)
        count = len(self._documents) - 1
        if count < 2:
            raise ValueError(f"documents: expected at least two with tokens in them, got {count}")
        self._frame = _PairFrame(tokenizer, tokenizer.decode(self._tokens[: self._sentences[1]].tolist()))
        self._room = max_length - len(self._frame)
        if self._room < 2:
            raise ValueError(f"max_length: expected at least {len(self._frame) + 2}, got {max_length}")
        self.short_share = short_share
        self._pairs = self._planned(random.Random(seed))
        if not len(self._pairs):
            raise ValueError(f"documents: expected one with two sentences or more, got {count} of a single one")

    def redrawn(self, seed: int) -> "NextSentencePairs":
        """The same documents in pairs of another seed; the tokens are shared."""
        other = copy.copy(self)
        other._pairs = self._planned(random.Random(seed))
        return other

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, list[int] | int]:
        if not isinstance(index, int):
            raise TypeError(f"index: expected an int, got {type(index).__name__}")
        a_start, a_stop, b_start, b_stop, label = self._pairs[index].tolist()
        first, second = self._tokens[a_start:a_stop].tolist(), self._tokens[b_start:b_stop].tolist()
        return {**self._frame.around(first, second), "next_sentence_label": label}

    def _planned(self, rng: random.Random) -> Tensor:
        """(pairs, 5): start and stop of either segment in the tokens, and the label."""
        sentences, documents = self._sentences, self._documents
        count = len(documents) - 1
        plan = array("q")
        for document in range(count):
            start, stop = documents[document], documents[document + 1]
            while stop - start >= 2:
                length = rng.randint(2, self._room) if rng.random() < self.short_share else self._room
                chunk_stop = bisect_left(sentences, sentences[start] + length, start + 2, stop)
                split = rng.randrange(start + 1, chunk_stop)
                a = sentences[start], sentences[split]
                label = rng.getrandbits(1)
                if label:
                    other = rng.randrange(count - 1)
                    other += other >= document
                    b_first = rng.randrange(documents[other], documents[other + 1])
                    left = length - (a[1] - a[0])
                    b_last = bisect_left(sentences, sentences[b_first] + left, b_first + 1, documents[other + 1])
                    b = sentences[b_first], sentences[b_last]
                    start = split
                else:
                    b = sentences[split], sentences[chunk_stop]
                    start = chunk_stop
                plan.extend((*_trimmed(a, b, self._room, rng), label))
        return torch.tensor(plan, dtype=torch.int64).view(-1, 5)


class _PairFrame:
    """What a tokenizer puts before, between and after two segments, read off a pair that it framed itself.

    Tokenizers built on the Rust library have no method that frames ids, so text has to go through the whole of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        segment = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pair = tokenizer(text, text, return_special_tokens_mask=True, return_token_type_ids=True, verbose=False)
        ids, types, special = pair["input_ids"], pair["token_type_ids"], pair["special_tokens_mask"]
        a_start = special.index(0)
        between = a_start + len(segment)
        b_start = special.index(0, between)
        after = b_start + len(segment)
        if a_start == 0 or b_start == between:
            raise ValueError(
                "tokenizer: expected one that puts special tokens before and between two segments, as BERT's does, "
                f"got {type(tokenizer).__name__}, which gives {tokenizer.decode(ids)[:60]!r}"
            )
        self._ids = ids[:a_start], ids[between:b_start], ids[after:]
        self._types = types[:a_start], types[between:b_start], types[after:]
        self._segment_types = types[a_start], types[b_start]

    def __len__(self) -> int:
        return sum(map(len, self._ids))

    def around(self, first: list[int], second: list[int]) -> dict[str, list[int]]:
        before, between, after = self._ids
        ids = [*before, *first, *between, *second, *after]
        before, between, after = self._types
        a_type, b_type = self._segment_types
        types = [*before, *[a_type] * len(first), *between, *[b_type] * len(second), *after]
        return {"input_ids": ids, "token_type_ids": types, "attention_mask": [1] * len(ids)}


def _trimmed(a: tuple[int, int], b: tuple[int, int], room: int, rng: random.Random) -> tuple[int, int, int, int]:
    """The slices ``a`` and ``b`` without what ``room`` tokens cannot hold.

    One token at a time would come off the longer of the two, at either end. The lengths that this leaves are known in
    advance, and the number that comes off the front is binomial: the bits that are set among as many random ones.
    """
    a_size, b_size = a[1] - a[0], b[1] - b[0]
    b_keeps = min(b_size, max(room - a_size, room // 2))
    a_keeps = min(a_size, room - b_keeps)
    a_start = a[0] + rng.getrandbits(a_size - a_keeps).bit_count()
    b_start = b[0] + rng.getrandbits(b_size - b_keeps).bit_count()
    return a_start, a_start + a_keeps, b_start, b_start + b_keeps


def _tokenized(documents: Iterable[Sequence[str]], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, array, array]:
    """All tokens in a row, where in them each sentence begins, and with which sentence each document, ends included."""
    parts: list[Tensor] = []
    sentences, starts = array("q", [0]), array("q", [0])
    for group in _grouped(documents):
        # verbose warns of sentences that are longer than the model takes, and pairs are trimmed
        encoded = iter(
            tokenizer(
                list(chain.from_iterable(group)),
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
        )
        flat = array("i")
        for document in group:
            for ids in (next(encoded) for _ in document):
                if ids:
                    flat.extend(ids)
                    sentences.append(sentences[-1] + len(ids))
            if len(sentences) - 1 > starts[-1]:
                starts.append(len(sentences) - 1)
        parts.append(torch.tensor(flat, dtype=torch.int32))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32), sentences, starts


def _grouped(documents: Iterable[Sequence[str]]) -> Iterator[list[list[str]]]:
    """Documents in lists of ``SENTENCES_AT_ONCE`` sentences or more."""
    group: list[list[str]] = []
    size = 0
    for place, document in enumerate(documents):
        if isinstance(document, str):
            raise TypeError(f"documents: expected sequences of sentences, got a str at place {place}")
        rows = list(document)
        for sentence in rows:
            if not isinstance(sentence, str):
                raise TypeError(f"documents: expected sentences of type str, got {type(sentence).__name__} in {place}")
        if rows:
            group.append(rows)
            size += len(rows)
        if size >= SENTENCES_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group
