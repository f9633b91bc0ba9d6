"""Largest loss increase and flipping radius: against closed forms of a linear model, and an ascent written by hand."""

import linear_classifier
import pytest
import tiny_models
import torch
from linear_classifier import BALLS, LinearClassifier, cut, margins, reach
from tiny_models import BagOfEmbeddings
from torch.nn import functional

from alum_kernels.backends.reference import noise_init as reference_noise
from alum_kernels.evaluation import (
    compare_loss_increase,
    compare_reports,
    largest_loss_increase,
    smallest_flipping_radius,
)
from alum_kernels.evaluation.flipping_radius import _bisected
from alum_kernels.evaluation.quartiles import Quartiles

OPTIONS = {"modules": ("embed",), "head": "classification"}


@pytest.fixture
def linear():
    return LinearClassifier(), linear_classifier.batch()


def close(actual, expected, rtol=1e-6, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("norm", "level"), BALLS)
@pytest.mark.parametrize("epsilon", [0.05, 0.8])
def test_the_largest_loss_of_a_linear_model_is_that_of_the_smallest_margin(linear, norm, level, epsilon):
    model, batch = linear
    report = largest_loss_increase(model, [batch], epsilon=epsilon, norm=norm, level=level, restarts=2, **OPTIONS)
    margin = margins(model, batch)
    close(report.clean_loss, functional.softplus(-margin), rtol=1e-12)
    close(report.largest_loss, functional.softplus(-(margin - epsilon * reach(model, norm, level))))
    close(report.increase, report.largest_loss - report.clean_loss)
    assert torch.equal(report.correct, margin > 0)
    assert 0 < report.correct.sum() < len(margin)
    assert report.counted.all()
    assert (report.epsilon == epsilon).all()


def test_single_precision_finds_the_same(linear):
    model, batch = linear
    report = largest_loss_increase(model.float(), [batch], epsilon=0.5, **OPTIONS)
    expected = functional.softplus(-(margins(model, batch) - 0.5 * reach(model.double(), "l2", "sequence")))
    close(report.largest_loss, expected, rtol=1e-5)


@pytest.mark.parametrize("form", ["tensor", "function"])
def test_every_sample_has_its_own_radius(linear, form):
    model, batch = linear
    radii = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    given = radii if form == "tensor" else lambda part: radii[part["input_ids"][:, 0] // 5 % 4 + 4 * (part["last"])]
    batch["last"] = torch.tensor([0, 0, 0, 0, 1, 1])
    model.forward = lambda input_ids, attention_mask, last: LinearClassifier.forward(model, input_ids, attention_mask)
    margin, taken = margins_of(model, batch), radii.double() * reach(model, "l2", "sequence")
    for batches in ([batch], cut(batch, 2, 1, 3)):
        report = largest_loss_increase(model, batches, epsilon=given, **OPTIONS)
        close(report.largest_loss, functional.softplus(-(margin - taken)))
        close(report.epsilon, radii.double(), rtol=1e-7)
    assert report.increase[0] == 0


def margins_of(model, batch):
    logits = LinearClassifier.forward(model, batch["input_ids"], batch["attention_mask"]).detach()
    difference = logits[:, 0] - logits[:, 1]
    return torch.where(batch["labels"] == 0, difference, -difference)


def ascents_by_hand(model: BagOfEmbeddings, batch: dict, epsilon: float, steps: int, restarts: int, seed: int):
    """(B,) largest loss over the clean point and l2 ascents with falling steps, in plain PyTorch."""
    mask, labels = batch["attention_mask"], batch["labels"]
    clean = model.embed(batch["input_ids"]).detach()

    def losses(embeds):
        return functional.cross_entropy(model.body(embeds, mask), labels, reduction="none")

    width = epsilon / (mask.sum(1) * clean.shape[2]).double().sqrt()
    largest = losses(clean).detach()
    for restart in range(restarts):
        noise = {"mask": mask, "distribution": "uniform", "stream": restart, "sample_offset": 0}
        unit = reference_noise.initial_delta(clean.shape, torch.tensor([seed]), torch.float64, std=1.0, **noise)
        delta = unit * width[:, None, None]
        for step in range(steps + 1):
            point = (clean + delta).requires_grad_()
            values = losses(point)
            largest = torch.maximum(largest, values.detach())
            if step == steps:
                break
            (grad,) = torch.autograd.grad(values.sum(), point)
            grad = grad * mask.unsqueeze(-1)
            delta = delta + 2 * epsilon * (1 - step / steps) * grad / grad.flatten(1).norm(dim=1)[:, None, None]
            delta = delta * (epsilon / delta.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None]
    return largest


@pytest.mark.parametrize("restarts", [1, 3])
def test_the_search_is_the_one_written_by_hand(restarts):
    model, batch = BagOfEmbeddings().double(), tiny_models.classification_batch(9)
    report = largest_loss_increase(model, [batch], epsilon=1.5, steps=6, restarts=restarts, seed=5, **OPTIONS)
    close(report.largest_loss, ascents_by_hand(model, batch, 1.5, 6, restarts, 5), rtol=1e-7)


def test_more_restarts_only_raise_the_loss_and_cuts_change_nothing():
    model, batch = BagOfEmbeddings().double(), tiny_models.classification_batch(9)
    found = [
        largest_loss_increase(model, [batch], epsilon=3.0, steps=3, restarts=restarts, **OPTIONS).largest_loss
        for restarts in (1, 2, 4)
    ]
    assert (found[1] >= found[0]).all()
    assert (found[2] >= found[1]).all()
    assert (found[2] > found[0]).any()
    pieces = largest_loss_increase(model, cut(batch, 4, 4, 1), epsilon=3.0, steps=3, restarts=4, **OPTIONS)
    close(pieces.largest_loss, found[2], rtol=1e-6)


def test_no_radius_no_increase_and_never_a_negative_one():
    model, batch = BagOfEmbeddings().double(), tiny_models.classification_batch(9)
    still = largest_loss_increase(model, [batch], epsilon=0.0, steps=2, **OPTIONS)
    close(still.increase, torch.zeros_like(still.increase))
    clean = functional.cross_entropy(
        model.body(model.embed(batch["input_ids"]), batch["attention_mask"]), batch["labels"], reduction="none"
    ).detach()
    noise = largest_loss_increase(model, [batch], epsilon=0.5, steps=0, restarts=1, seed=5, **OPTIONS)
    expected = ascents_by_hand(model, batch, 0.5, 0, 1, 5) - clean
    assert 0 < (expected == 0).sum() < 9  # the noise lowers the loss of some samples
    close(noise.increase, expected, rtol=1e-7)


def test_a_regression_has_the_squared_error_and_is_always_right():
    model = tiny_models.bert(labels=1).double()
    batch = tiny_models.regression_batch(5)
    report = largest_loss_increase(model, [batch], epsilon=0.2, steps=5)
    predictions = model.eval()(batch["input_ids"], batch["attention_mask"]).logits[:, 0].detach()
    close(report.clean_loss, (predictions - batch["labels"]).square(), rtol=1e-6)
    assert report.correct.all()
    assert (report.increase > 0).all()


@pytest.mark.parametrize(("norm", "level"), BALLS)
def test_the_flipping_radius_of_a_linear_model_is_its_margin_over_the_dual_norm(linear, norm, level):
    model, batch = linear
    margin, unit = margins(model, batch), reach(model, norm, level)
    exact = torch.where(margin > 0, margin / unit, 0.0)
    limit = exact.max().item() * 1.5
    for batches in ([batch], cut(batch, 1, 5)):
        found = smallest_flipping_radius(model, batches, max_epsilon=limit, norm=norm, level=level, **OPTIONS)
        assert (found.radius >= exact * (1 - 1e-6)).all()
        assert (found.withstood <= exact * (1 + 1e-6)).all()
        close(found.radius, exact, rtol=0.01)
        close(found.withstood, exact, rtol=0.01)
    assert (found.radius[margin < 0] == 0).all()


def test_samples_that_no_search_flips_have_an_infinite_radius(linear):
    model, batch = linear
    margin, unit = margins(model, batch), reach(model, "l2", "sequence")
    exact = torch.where(margin > 0, margin / unit, 0.0)
    limit = exact[exact > 0].sort().values[:2].mean().item()
    found = smallest_flipping_radius(model, [batch], max_epsilon=limit, **OPTIONS)
    beyond = exact > limit
    assert 0 < beyond.sum() < (exact > 0).sum()
    assert torch.equal(found.radius.isinf(), beyond)
    close(found.withstood[beyond], torch.full_like(found.withstood[beyond], limit), rtol=1e-6)


def scripted(*rounds):
    """Searches that find what is written: of each round the norms of the flips, inf where a ball holds."""
    found = iter(rounds)
    tried = []

    def nearest(radius):
        tried.append(radius)
        return torch.tensor(next(found), dtype=torch.float64)

    return nearest, tried


HOLDS = float("inf")


@pytest.mark.parametrize(
    ("flips", "tried", "radius", "withstood"),
    [
        # floor 1e-4: tried are geometric means of what held last and what flipped nearest
        ([1.0, HOLDS, HOLDS, 0.2], [1.0, 0.01, 0.1, 0.1**0.5], 0.2, 0.1),
        ([HOLDS] * 4, [1.0], HOLDS, 1.0),  # nothing to bisect
        ([1.0, HOLDS, HOLDS, 0.05, HOLDS], [1.0, 0.01, 0.1, 0.1**0.5, 5e-4**0.5], 0.05, 5e-4**0.5),  # 0.1 contradicted
        ([1.0, HOLDS, HOLDS, 0.05], [1.0, 0.01, 0.1, 0.1**0.5], 0.05, 0.01),
        ([1.0, HOLDS, 0.005, HOLDS], [1.0, 0.01, 0.1, 5e-7**0.5], 0.005, 5e-7**0.5),  # back to the floor
        ([1.0, HOLDS, 0.005], [1.0, 0.01, 0.1], 0.005, 0.0),
        ([1.0, HOLDS, 0.01], [1.0, 0.01, 0.1], 0.01, 0.0),  # at the very radius that held
        ([0.5, 5e-5, HOLDS], [1.0, 5e-5**0.5, 5e-5], 5e-5, 0.0),  # the ball of the flip itself, below the floor
    ],
)
def test_what_was_withstood_was_searched_and_never_contradicted(flips, tried, radius, withstood):
    nearest, asked = scripted(*([flip] for flip in flips))
    found = _bisected(nearest, torch.tensor([True]), 1.0, len(flips) - 1)
    close(torch.cat(asked), torch.tensor(tried, dtype=torch.float64))
    assert found[0].item() == radius
    close(found[1], torch.tensor([withstood], dtype=torch.float64))
    assert found[1].item() in [0.0, *torch.cat(asked).tolist()]


def test_samples_are_bisected_apart():
    nearest, asked = scripted([1.0, HOLDS, 0.3], [0.005, HOLDS, 1e-3], [HOLDS, HOLDS, HOLDS])
    radius, withstood = _bisected(nearest, torch.tensor([True, True, False]), 1.0, 2)
    assert radius.tolist() == [0.005, HOLDS, 0.0]
    close(withstood, torch.tensor([5e-7**0.5, 1.0, 0.0], dtype=torch.float64))
    close(asked[2][:2], torch.tensor([5e-7**0.5, 1.0], dtype=torch.float64))


def test_models_are_compared_where_all_are_right(linear):
    model, batch = linear
    other = LinearClassifier()
    with torch.no_grad():
        other.weight.copy_(model.weight + 0.6 * torch.randn(6, 2, generator=torch.Generator().manual_seed(2)))
    models = {"first": model, "other": other}
    right = torch.stack([margins(one, batch) > 0 for one in models.values()]).all(0)
    assert 1 < right.sum() < (margins(model, batch) > 0).sum()
    compared = compare_loss_increase(models, cut(batch, 4, 2), epsilon=0.3, **OPTIONS)
    assert torch.equal(compared.shared, right)
    assert compared.samples == right.sum()
    for name, one in models.items():
        margin = margins(one, batch)[right]
        taken = 0.3 * reach(one, "l2", "sequence")[right]
        increase = functional.softplus(taken - margin) - functional.softplus(-margin)
        close(compared.increases(name), increase, rtol=1e-5)
        assert compared.quartiles(name).median == pytest.approx(increase.quantile(0.5).item(), rel=1e-5)
        assert compared.quartiles(name).lower == pytest.approx(increase.quantile(0.25).item(), rel=1e-5)


def test_the_radii_of_a_comparison_come_from_the_first_model(linear):
    model, batch = linear
    twice = LinearClassifier()
    with torch.no_grad():
        twice.weight.mul_(2)
    found = compare_loss_increase({"once": model, "twice": twice}, [batch], max_epsilon=5.0, **OPTIONS)
    margin = margins(model, batch)[found.shared]
    at_the_border = torch.full_like(margin, torch.log(torch.tensor(2.0)).item())
    for name, factor in (("once", 1), ("twice", 2)):  # both at margin zero: ln 2, from different clean losses
        close(found.increases(name), at_the_border - functional.softplus(-factor * margin), rtol=0.1, atol=0.01)
    assert torch.equal(found.reports["once"].epsilon, found.reports["twice"].epsilon)


def test_quartiles_lie_between_order_statistics(linear):
    assert Quartiles.of(torch.tensor([4.0, 1.0, 2.0, 3.0])) == (1.75, 2.5, 3.25)
    model, batch = linear
    report = largest_loss_increase(model, [batch], epsilon=0.1, **OPTIONS)
    assert report.quartiles().median == pytest.approx(report.increase[report.correct].quantile(0.5).item())
    assert report.quartiles(only_correct=False).median == pytest.approx(report.increase.quantile(0.5).item())
    wrong = {**batch, "labels": (margins(model, batch) < 0).long() ^ batch["labels"] ^ 1}
    with pytest.raises(ValueError, match=r"^only_correct: no sample"):
        largest_loss_increase(model, [wrong], epsilon=0.1, **OPTIONS).quartiles()
    with pytest.raises(ValueError, match=r"^reports: expected at least one sample that every model gets right, got no"):
        compare_loss_increase({"a": model}, [wrong], epsilon=0.1, **OPTIONS)
    assert compare_loss_increase({"a": model}, [wrong], epsilon=0.1, only_correct=False, **OPTIONS).samples == 6


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epsilon": torch.ones(5)}, ValueError, "^epsilon: expected one radius for each sample, got 5 for at least 6"),
        ({"epsilon": torch.ones(7)}, ValueError, "^epsilon: expected one radius for each of 6 samples, got 7"),
        ({"epsilon": torch.ones(6, 1)}, ValueError, r"^epsilon: expected .* of shape \(samples,\)"),
        ({"epsilon": -torch.ones(6)}, ValueError, "^epsilon: expected finite numbers >= 0"),
        ({"epsilon": lambda batch: torch.ones(2)}, ValueError, r"^epsilon: expected the function to return shape \(6,"),
        ({"epsilon": "far"}, TypeError, "^epsilon: expected a number, a tensor or a function"),
        ({"epsilon": 0.1, "restarts": 0}, ValueError, "^restarts: expected a number >= 1, got 0"),
        ({"epsilon": 0.1, "level": "batch"}, ValueError, "^level: expected one of 'token', 'sequence'"),
        ({"epsilon": 0.1, "head": "nothing"}, ValueError, "^head: expected one of"),
    ],
)
def test_bad_arguments_of_the_increase_are_named(linear, options, error, message):
    model, batch = linear
    with pytest.raises(error, match=message):
        largest_loss_increase(model, [batch], **{**OPTIONS, **options})


def test_bad_arguments_of_the_others_are_named(linear):
    model, batch = linear
    with pytest.raises(ValueError, match=r"^batches: expected at least one sample"):
        largest_loss_increase(model, [], epsilon=0.1, **OPTIONS)
    with pytest.raises(ValueError, match=r"^max_epsilon: expected a number > 0"):
        smallest_flipping_radius(model, [batch], max_epsilon=0, **OPTIONS)
    with pytest.raises(TypeError, match=r"^rounds: expected an int, got float"):
        smallest_flipping_radius(model, [batch], max_epsilon=1, rounds=1.0, **OPTIONS)
    with pytest.raises(ValueError, match=r"^rounds: expected a number >= 0, got -1"):
        smallest_flipping_radius(model, [batch], max_epsilon=1, rounds=-1, **OPTIONS)
    with pytest.raises(ValueError, match=r"^head: expected one of .*, got 'regression'"):
        smallest_flipping_radius(model, [batch], max_epsilon=1, modules=("embed",), head="regression")
    with pytest.raises(ValueError, match=r"^models: expected at least one model"):
        compare_loss_increase({}, [batch], epsilon=0.1)
    for given in ({}, {"epsilon": 0.1, "max_epsilon": 1.0}):
        with pytest.raises(ValueError, match=r"^epsilon, max_epsilon: expected exactly one of them"):
            compare_loss_increase({"a": model}, [batch], **given)
    with pytest.raises(ValueError, match=r"^reports: expected at least one report"):
        compare_reports({})
    measured = {str(e): largest_loss_increase(model, [batch], epsilon=e, steps=1, **OPTIONS) for e in (0.1, 0.2)}
    with pytest.raises(ValueError, match=r"^reports: expected the same samples with the same radii"):
        compare_reports(measured)
