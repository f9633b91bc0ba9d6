"""Accuracy under attack: against an attack whose result is known, and against one written by hand."""

import inspect
from functools import partial

import pytest
import tiny_models
import torch
from processes import group_of_one
from tiny_models import BagOfEmbeddings
from torch import nn

from alum_kernels.backends.reference import noise_init as reference_noise
from alum_kernels.evaluation import (
    accuracy_under_attack,
    largest_loss_increase,
    local_smoothness,
    smallest_flipping_radius,
)

MARGINS = (0.3, 0.9, 1.5, -0.5)


class Linear(nn.Module):
    """Logits (x, -x) of the mean embedding, so that a sample flips when each element moves by its margin."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(torch.tensor(MARGINS).unsqueeze(1).repeat(1, 4), freeze=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids).mean((1, 2))
        return torch.stack((x, -x), dim=-1)


LINEAR_BATCH = {"input_ids": torch.arange(4).unsqueeze(1).repeat(1, 3), "labels": torch.zeros(4, dtype=torch.long)}
OPTIONS = {"modules": ("embed",), "head": "classification"}


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(
    ("epsilon", "right"), [(0.0, 3), (0.29, 3), (0.31, 2), (0.89, 2), (0.91, 1), (1.49, 1), (1.51, 0)]
)
def test_the_linf_attack_finds_exactly_the_margins(epsilon, right, backend):
    report = accuracy_under_attack(Linear(), [LINEAR_BATCH], epsilon=epsilon, backend=backend, **OPTIONS)
    assert report.clean_accuracy == 0.75
    assert report.attacked_accuracy == right / 4
    assert report.rows == 4
    assert report.delta_rms == pytest.approx(epsilon, rel=1e-6)
    shifted = torch.tensor(MARGINS, dtype=torch.float64) - epsilon
    loss = nn.functional.softplus(-2 * shifted).mean().item()
    assert report.attacked_loss == pytest.approx(loss, rel=1e-5)
    assert report.clean_loss == pytest.approx(
        nn.functional.softplus(-2 * torch.tensor(MARGINS, dtype=torch.float64)).mean().item(), rel=1e-5
    )


@pytest.mark.parametrize(("level", "elements"), [("token", 4), ("sequence", 12)])
def test_the_l2_attack_finds_exactly_the_margins(level, elements):
    for margin, right in ((0.3, (3, 2)), (0.9, (2, 1))):
        for factor, count in zip((0.99, 1.01), right, strict=True):
            epsilon = margin * factor * elements**0.5
            report = accuracy_under_attack(
                Linear(),
                [LINEAR_BATCH],
                epsilon=epsilon,
                norm="l2",
                level=level,
                steps=5,
                step_size=2 * epsilon,
                **OPTIONS,
            )
            assert report.attacked_accuracy == count / 4
            assert report.delta_rms == pytest.approx(margin * factor, rel=1e-4)


def by_hand(model: BagOfEmbeddings, batch: dict, epsilon: float, steps: int, seed: int, offset: int = 0):
    """Rows right at every point, and the last loss, of a signed attack in plain PyTorch."""
    mask, labels = batch["attention_mask"], batch["labels"]
    clean = model.embed(batch["input_ids"]).detach()
    noise = {"std": epsilon, "mask": mask, "distribution": "uniform", "stream": 0, "sample_offset": offset}
    delta = reference_noise.initial_delta(clean.shape, torch.tensor([seed]), torch.float64, **noise)
    right = model.body(clean, mask).argmax(-1) == labels
    for step in range(steps + 1):
        point = (clean + delta).requires_grad_()
        logits = model.body(point, mask)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        right &= logits.argmax(-1) == labels
        if step < steps:
            (grad,) = torch.autograd.grad(loss, point)
            delta = (delta + 2.5 * epsilon / steps * grad.sign()).clamp(-epsilon, epsilon)
    return right, loss.detach()


@pytest.mark.parametrize("steps", [1, 3])
def test_the_attack_is_the_one_written_by_hand(steps):
    model, batch = BagOfEmbeddings().double(), tiny_models.classification_batch(12)
    report = accuracy_under_attack(model, [batch], epsilon=0.2, steps=steps, seed=4, **OPTIONS)
    right, loss = by_hand(model, batch, 0.2, steps, 4)
    assert report.attacked_accuracy == right.double().mean().item()
    assert report.attacked_loss == pytest.approx(loss.item() / 12, rel=1e-12)


def test_how_samples_are_batched_changes_nothing_and_the_seed_does():
    model, batch = BagOfEmbeddings().double(), tiny_models.classification_batch(12)
    parts = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 5), slice(5, 6), slice(6, 12))]

    def attack(batches, seed=0):
        return accuracy_under_attack(model, batches, epsilon=0.1, steps=0, seed=seed, **OPTIONS)

    whole, split = attack([batch]), attack(parts)
    assert attack([batch]) == whole
    assert split.attacked_accuracy == whole.attacked_accuracy
    assert split.attacked_loss == pytest.approx(whole.attacked_loss, rel=1e-12)
    assert attack([batch], seed=1).attacked_loss != whole.attacked_loss


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", tiny_models.CLASSIFIERS)
def test_steps_of_the_attack_raise_the_loss_of_real_architectures(name, norm):
    model, batch = tiny_models.CLASSIFIERS[name](), tiny_models.classification_batch(6)
    noise, attack = (accuracy_under_attack(model, [batch], epsilon=0.1, norm=norm, steps=steps) for steps in (0, 4))
    assert attack.clean_loss == noise.clean_loss
    assert attack.attacked_loss > noise.attacked_loss + 0.1 * abs(noise.attacked_loss - noise.clean_loss)
    assert attack.attacked_loss > attack.clean_loss


def test_masked_lm_counts_labelled_positions():
    model, batch = tiny_models.bert_masked_lm(), tiny_models.masked_lm_batch()
    report = accuracy_under_attack(model, [batch, tiny_models.masked_lm_batch(2, seed=1)], epsilon=0.1)
    logits = model(**tiny_models.tokens()).logits.double()
    assert report.rows == 7 + 3
    alone = accuracy_under_attack(model, [batch], epsilon=0.1)
    labelled = batch["labels"] != -100
    expected = nn.functional.cross_entropy(logits[labelled], batch["labels"][labelled])
    assert alone.clean_loss == pytest.approx(expected.item(), rel=1e-5)
    assert alone.clean_accuracy == (logits.argmax(-1) == batch["labels"])[labelled].double().mean().item()
    assert alone.attacked_loss > alone.clean_loss


FIGURES = {
    "accuracy": partial(accuracy_under_attack, epsilon=0.1),
    "increase": partial(largest_loss_increase, epsilon=0.1, steps=2),
    "radius": partial(smallest_flipping_radius, max_epsilon=0.1, steps=2, rounds=1),
    "smoothness": partial(local_smoothness, epsilon=0.1, steps=2),
}


def same(first, second) -> bool:
    pairs = [(vars(first)[name], vars(second)[name]) for name in vars(first)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.fixture
def process_group(tmp_path):
    with group_of_one(tmp_path):
        yield


@pytest.mark.parametrize("name", FIGURES)
def test_a_wrapper_is_seen_through(name, process_group):
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert same(FIGURES[name](wrapped, [batch]), FIGURES[name](model, [batch]))


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("fatal", [False, True])
def test_the_model_is_left_as_it_was(fatal, name):
    measure = FIGURES[name]
    model, batch = tiny_models.bert(0.3), tiny_models.classification_batch()
    model.bert.pooler.eval()
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: pytest.fail(f"{name} received a gradient"))
    before = [module.training for module in model.modules()]
    weights = [parameter.clone() for parameter in model.parameters()]
    if fatal:
        with pytest.raises(ValueError, match=r"attention_mask: expected shape \(4, 7\)"):
            measure(model, [batch, {**batch, "attention_mask": torch.ones(4, 6)}])
    else:
        assert same(measure(model, [batch]), measure(model, [batch]))
    assert [module.training for module in model.modules()] == before
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert list(grads) == ["classifier.weight"]
    assert (grads["classifier.weight"] == 1).all()
    assert not model.bert.embeddings.word_embeddings._forward_hooks


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epsilon": -1.0}, ValueError, "^epsilon: expected a finite number >= 0"),
        ({"epsilon": 0.1, "step_size": -1.0}, ValueError, "^step_size: expected"),
        ({"epsilon": 0.1, "steps": -1}, ValueError, "^steps: expected a number >= 0, got -1"),
        ({"epsilon": 0.1, "steps": 1.0}, TypeError, "^steps: expected an int, got float"),
        ({"epsilon": 0.1, "steps": True}, TypeError, "^steps: expected an int, got bool"),
        ({"epsilon": 0.1, "norm": "none"}, ValueError, "^norm: expected one of 'linf', 'l2'"),
        ({"epsilon": 0.1, "level": "word"}, ValueError, "^level: expected one of"),
        ({"epsilon": 0.1, "head": "regression"}, ValueError, "^head: expected one of .*, got 'regression'"),
        ({"epsilon": 0.1, "head": "pretraining"}, ValueError, "^head: expected one of .*, got 'pretraining'"),
        ({"epsilon": 0.1, "restarts": 0}, ValueError, "^restarts: expected a number >= 1, got 0"),
        ({"epsilon": torch.ones(3)}, ValueError, "^epsilon: expected one radius for each sample, got 3 for at least 4"),
        ({"epsilon": torch.ones(4), "norm": "l2", "level": "batch"}, ValueError, "^epsilon: .* one radius for the bat"),
        ({"epsilon": 0.1, "modules": ("nowhere",)}, ValueError, "no module named 'nowhere'"),
        ({"epsilon": 0.1, "modules": "embed"}, TypeError, "^modules: expected a sequence of module names, got one str"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        accuracy_under_attack(tiny_models.bert(), [tiny_models.classification_batch()], **options)


def test_a_caller_may_be_without_gradients():
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    expected = accuracy_under_attack(model, [batch], epsilon=0.1)
    with torch.no_grad():
        assert accuracy_under_attack(model, [batch], epsilon=0.1) == expected


def test_bad_batches_are_named():
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    with pytest.raises(ValueError, match=r"^batches: expected at least one sample"):
        accuracy_under_attack(model, [], epsilon=0.1)
    with pytest.raises(ValueError, match=r"^batches: expected at least one labelled row"):
        accuracy_under_attack(model, [{**batch, "labels": torch.full((4,), -100)}], epsilon=0.1)
    with pytest.raises(ValueError, match=r"^labels: expected shape \(4,\) as the logits, got \(3,\)"):
        accuracy_under_attack(model, [{**batch, "labels": batch["labels"][:3]}], epsilon=0.1)
    with pytest.raises(ValueError, match=r"expected 'labels' \(B,\) of class indices .*, got torch\.float32"):
        accuracy_under_attack(model, [{**batch, "labels": batch["labels"].float()}], epsilon=0.1)


def test_every_sample_may_have_its_own_radius():
    radii = torch.tensor([0.31, 0.89, 1.51, 0.0])
    pieces = [{key: value[part] for key, value in LINEAR_BATCH.items()} for part in (slice(0, 1), slice(1, 4))]
    report = accuracy_under_attack(Linear(), pieces, epsilon=radii, **OPTIONS)
    assert report.attacked_accuracy == 0.25  # of margins .3, .9, 1.5 and -.5 only the second is out of reach
    assert report.delta_rms == pytest.approx(radii.square().mean().sqrt().item(), rel=1e-5)


SEARCH = {
    "steps": 7,
    "step_size": 0.25,
    "norm": "linf",
    "level": "token",
    "restarts": 5,
    "seed": 11,
    "modules": ("embed",),
    "head": "classification",
    "backend": "reference",
}


class AskedError(Exception):
    """Carries the search that a figure asked for."""


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("given", ["all", "one at a time"])
def test_every_option_of_the_search_arrives(name, given, monkeypatch):
    """In its own place, and the others keep the defaults that the signature shows."""
    measure, keyword = FIGURES[name].func, {"restarts": "draws"} if name == "smoothness" else {}

    def asked(model, search, **served):
        raise AskedError(search)

    monkeypatch.setitem(measure.__globals__, "attacking", asked)
    ball = {"max_epsilon" if name == "radius" else "epsilon": 0.1}
    shown = inspect.signature(measure).parameters
    defaults = {option: shown[keyword.get(option, option)].default for option in SEARCH}
    for options in [SEARCH] if given == "all" else [{option: value} for option, value in SEARCH.items()]:
        with pytest.raises(AskedError) as found:
            measure(None, [], **ball, **{keyword.get(option, option): value for option, value in options.items()})
        assert vars(found.value.args[0]) == {**defaults, **options}


def test_the_defaults_of_each_figure():
    l2 = {"norm": "l2", "level": "sequence", "step_size": None, "seed": 0, "modules": (), "head": None, "backend": None}
    expected = {
        "accuracy": {**l2, "norm": "linf", "level": "token", "steps": 3, "restarts": 1},
        "increase": {**l2, "steps": 20, "restarts": 3},
        "radius": {**l2, "steps": 20, "restarts": 1, "rounds": 10},
        "smoothness": {**l2, "steps": 10, "draws": 1, "positions": "labelled"},
    }
    for name, figure in FIGURES.items():
        shown = inspect.signature(figure.func).parameters.values()
        assert {one.name: one.default for one in shown if one.default is not one.empty} == expected[name]


def test_a_row_must_be_right_under_every_restart():
    model, batch = BagOfEmbeddings().double(), tiny_models.classification_batch(24)
    options = {"epsilon": 0.6, "steps": 0, "seed": 2, **OPTIONS}
    mask, labels = batch["attention_mask"], batch["labels"]
    clean = model.embed(batch["input_ids"]).detach()
    right = model.body(clean, mask).argmax(-1) == labels
    losses = []
    for restart in range(3):
        noise = {"std": 0.6, "mask": mask, "distribution": "uniform", "stream": restart, "sample_offset": 0}
        delta = reference_noise.initial_delta(clean.shape, torch.tensor([2]), torch.float64, **noise)
        logits = model.body(clean + delta, mask)
        right &= logits.argmax(-1) == labels
        losses.append(nn.functional.cross_entropy(logits, labels, reduction="none").detach())
    report = accuracy_under_attack(model, [batch], restarts=3, **options)
    assert report.attacked_accuracy == right.double().mean().item()
    assert report.attacked_accuracy < accuracy_under_attack(model, [batch], **options).attacked_accuracy
    assert report.attacked_loss == pytest.approx(torch.stack(losses).amax(0).mean().item(), rel=1e-12)
