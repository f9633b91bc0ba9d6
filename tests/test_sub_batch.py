"""A part of the batch: the mean over every choice of samples is the regulariser, and its gradient, of the whole batch.

Here each sample's regulariser depends on that sample alone: no dropout, and a first perturbation that is a function of
its embeddings, so that a sample is perturbed alike wherever it lies.
"""

import itertools
from collections.abc import Sequence

import pytest
import tiny_models
import torch
from tiny_models import Gradients
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.adversarial import perturbation, run
from alum_kernels.adversarial.sub_batch import Choice, SubBatch, choose

SAMPLES, LENGTH = 4, 7
CASES = [
    pytest.param("classification", None, id="classification"),
    pytest.param("regression", None, id="regression"),
    pytest.param("choice", None, id="choice"),
    pytest.param("spans", None, id="spans"),
    pytest.param("masked_lm", False, id="masked-lm-logits"),
    pytest.param("masked_lm", True, id="masked-lm-linear"),
]


def batch_of(task: str) -> dict[str, Tensor]:
    """Samples that differ in length; of the masked LM, in their labelled tokens: 1, 0, 6 and 2 of them."""
    batch = tiny_models.batch(task, SAMPLES, LENGTH)
    if task == "masked_lm":
        labelled = torch.arange(LENGTH) < torch.tensor([[1], [0], [6], [2]])
        labelled = labelled & (batch["attention_mask"] == 1)
        batch["labels"] = torch.where(labelled, batch["input_ids"], -100)
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def perturb_by_content(embeds: Tensor, *, std, mask=None, return_delta=False, **_) -> Tensor | tuple[Tensor, Tensor]:
    """Stands in for ``noise_init``: what a row is moved by depends on the row alone."""
    delta = 0.05 * torch.sin(40 * embeds.detach())
    delta = delta if mask is None else delta * mask.unsqueeze(-1)
    return (embeds + delta, delta) if return_delta else embeds + delta


@pytest.fixture
def by_content(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(perturbation, "noise_init", perturb_by_content)
    return monkeypatch


def config_of(fused: bool | None, **changes) -> AdversarialConfig:
    ball = {"std": 0.0, "step_size": 5e-2, "epsilon": 8e-2, "normalize": "linf"}
    return AdversarialConfig.alum_finetuning(**ball, fused_head=fused, **changes)


def one_step(model: nn.Module, batch: dict[str, Tensor], config: AdversarialConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Task loss, divergence and the flat gradient of the step."""
    objective = AdversarialObjective(model, config)
    model.zero_grad()
    figures = objective.backward(batch)
    objective.remove_hooks()
    return figures["task_loss"], figures["divergence"], Gradients.of(model).flat()


def choices_of(chosen: int, block: int = SAMPLES) -> list[Choice]:
    """Every choice of so many samples of each block of consecutive ones."""
    blocks = [range(start, start + block) for start in range(0, SAMPLES, block)]
    of_blocks = itertools.product(*(itertools.combinations(places, chosen) for places in blocks))
    return [choice_of(sorted(itertools.chain(*indices))) for indices in of_blocks]


def choice_of(indices: Sequence[int]) -> Choice:
    rest = [index for index in range(SAMPLES) if index not in indices]
    return Choice(torch.tensor(indices), torch.tensor(rest), 0)


def mean_over_choices(
    model: nn.Module,
    batch: dict[str, Tensor],
    config: AdversarialConfig,
    choices: list[Choice],
    patch: pytest.MonkeyPatch,
) -> tuple[Tensor, ...]:
    """The mean of :func:`one_step` over choices, with their share as the fraction."""
    results = []
    for choice in choices:
        patch.setattr(run, "choose", lambda *_, choice=choice: choice)
        fraction = len(choice.index) / SAMPLES
        results.append(one_step(model, batch, config.replace(adversarial_fraction=fraction)))
    return tuple(torch.stack(of_all).mean(0) for of_all in zip(*results, strict=True))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dropout", ["shared", "independent"])
@pytest.mark.parametrize(
    ("chosen", "block", "count"), [(1, 4, 4), (2, 4, 6), (3, 4, 4), (1, 2, 4)], ids=["1 of 4", "2", "3", "1 of each 2"]
)
@pytest.mark.parametrize(("task", "fused"), CASES)
def test_the_mean_over_all_choices_is_the_whole_batch(task, fused, chosen, block, count, dropout, by_content):
    model = tiny_models.make("bert", task, dtype=torch.float64)
    batch, config = batch_of(task), config_of(fused, dropout=dropout)
    whole = one_step(model, batch, config)
    assert whole[1] > 1e-5, "nothing was perturbed"
    choices = choices_of(chosen, block)
    assert len({tuple(choice.index.tolist()) for choice in choices}) == count
    parts = mean_over_choices(model, batch, config, choices, by_content)
    for name, found, wanted in zip(("task loss", "divergence", "gradient"), parts, whole, strict=True):
        assert relative(found, wanted) < 1e-10, name


@pytest.mark.parametrize("fused", [False, True])
def test_the_mean_over_the_chosen_rows_would_be_biased(fused, by_content):
    """The ratio of two sums that both depend on the choice."""
    model, batch = tiny_models.make("bert", "masked_lm", dtype=torch.float64), batch_of("masked_lm")
    config = config_of(fused, clean_weight=0.0)
    _, divergence, gradient = one_step(model, batch, config)
    by_content.setattr(SubBatch, "_shares", lambda self, chosen, *_: torch.ones(len(chosen)))
    _, of_ratios, gradient_of_ratios = mean_over_choices(model, batch, config, choices_of(2), by_content)
    assert relative(of_ratios, divergence) > 0.02
    assert relative(gradient_of_ratios, gradient) > 0.02


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_answers_that_lie_partly_outside_weigh_as_in_the_models_own_loss(family, monkeypatch):
    """Starts and ends are means over different samples; one end is beyond the sequence, one in the padding."""
    model = tiny_models.make(family, "spans", dtype=torch.float64)
    starts, ends = torch.tensor([1, 2, 1, 0]), torch.tensor([2, 1000, 6, -100])
    batch = {**batch_of("spans"), "start_positions": starts, "end_positions": ends}
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradient = Gradients.of(model).flat()
    config = config_of(None, alpha=1e-30)
    for chosen in range(1, SAMPLES):
        for indices in itertools.combinations(range(SAMPLES), chosen):
            choice = choice_of(indices)
            monkeypatch.setattr(run, "choose", lambda *_, choice=choice: choice)
            found, _, own = one_step(model, batch, config.replace(adversarial_fraction=chosen / SAMPLES))
            torch.testing.assert_close(found, loss.detach(), rtol=1e-12, atol=0)
            assert relative(own, gradient) < 1e-12


# the choice


@pytest.mark.parametrize(("count", "fraction", "chosen"), [(8, 0.25, 2), (5, 0.5, 2), (3, 0.1, 1), (2, 0.9, None)])
def test_a_share_of_the_samples_is_chosen(count, fraction, chosen):
    batch = {"input_ids": torch.zeros(count, 3, dtype=torch.long)}
    found = choose(batch, fraction, torch.tensor([4]), 0)
    if chosen is None:
        assert found is None
        return
    index, rest, _ = found
    assert len(index) == chosen
    assert torch.equal(torch.cat([index, rest]).sort().values, torch.arange(count))
    assert torch.equal(index, index.sort().values)
    assert torch.equal(rest, rest.sort().values)


def test_every_sample_is_as_likely_and_a_place_has_its_own_choice():
    batch, counts = {"input_ids": torch.zeros(8, 3, dtype=torch.long)}, torch.zeros(8)
    for seed in range(4000):
        counts[choose(batch, 0.25, torch.tensor([seed]), 0).index] += 1
    assert (counts / 4000 - 0.25).abs().max() < 0.03  # four standard deviations

    def choices(place: int) -> list[list[int]]:
        return [choose(batch, 0.25, torch.tensor([seed]), place).index.tolist() for seed in range(20)]

    assert choices(0) == choices(0) != choices(8)


@pytest.mark.parametrize(
    ("fraction", "block", "chosen"), [(0.25, 4, 1), (0.375, 8, 3), (1 / 3, 3, 1), (5 / 6, 6, 5), (1 / 64, 64, 1)]
)
def test_blocks_choose_apart_so_that_a_split_at_them_changes_nothing(fraction, block, chosen):
    """Neither which samples are chosen, nor the places of their noise."""

    def choice(begin: int, end: int, seed: int) -> Choice:
        ids = torch.zeros(end - begin, 3, dtype=torch.long)
        return choose({"input_ids": ids}, fraction, torch.tensor([seed]), begin)

    seen = set()
    for seed in range(8):
        whole = choice(block, 5 * block, seed)
        assert torch.equal(torch.bincount(whole.index // block), torch.full((4,), chosen))
        assert whole.noise_offset == chosen
        parts = [(begin, choice(begin, end, seed)) for begin, end in ((block, 2 * block), (2 * block, 5 * block))]
        places = torch.cat([part.index + begin for begin, part in parts])
        assert torch.equal(places, whole.index + block)
        assert [part.noise_offset for _, part in parts] == [chosen, 2 * chosen]
        seen.add(tuple(whole.index.tolist()))
    assert len(seen) > 4


def test_where_blocks_do_not_fit_the_choice_is_among_the_batch_at_hand():
    """An offset or a count that is no multiple, and a fraction that is no ratio of numbers up to 64."""
    for count, offset, fraction in ((8, 2, 0.25), (6, 0, 0.25), (8, 0, 0.251)):
        batch, of_first = {"input_ids": torch.zeros(count, 3, dtype=torch.long)}, set()
        for seed in range(40):
            found = choose(batch, fraction, torch.tensor([seed]), offset)
            assert len(found.index) == round(fraction * count) == 2
            assert found.noise_offset == offset
            of_first.add(int((found.index < 4).sum()))
        assert of_first == {0, 1, 2}


@pytest.mark.parametrize("dropout", ["shared", "off"])
def test_a_batch_that_is_split_at_blocks_has_the_gradient_of_the_whole(dropout):
    model, seed = tiny_models.make("bert", "classification", dtype=torch.float64), torch.tensor([11])
    config = AdversarialConfig.alum_finetuning(std=0.05, step_size=0.05, epsilon=0.08, normalize="linf")
    objective = AdversarialObjective(model, config.replace(adversarial_fraction=0.5, dropout=dropout))
    batch = tiny_models.classification_batch(8)
    objective.forward(batch, seed=seed).loss.backward()
    whole = Gradients.of(model).flat()
    model.zero_grad()
    for begin, end in ((0, 2), (2, 8)):
        part = {name: value[begin:end] for name, value in batch.items()}
        loss = objective.forward(part, seed=seed, sample_offset=begin).loss
        (loss * (end - begin) / 8).backward()
    assert relative(Gradients.of(model).flat(), whole) < 1e-12
