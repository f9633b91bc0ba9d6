"""Local linearity against the same written out sample by sample, analytic cases, and finite differences."""

import copy
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from tiny_models import BagOfEmbeddings, Gradients
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.adversarial.local_linearity import Expansion
from alum_kernels.adversarial.perturbation import Perturbation
from alum_kernels.adversarial.sites import perturbed_sites
from alum_kernels.backends.reference import noise_init as reference_noise
from alum_kernels.backends.reference import projected_ascent as reference_ascent

NEAR = AdversarialConfig.llr(std=0.05, step_size=0.05, epsilon=0.1, units="absolute")
TASKS = [
    ("bert", "classification"),
    ("bert", "regression"),
    ("bert", "choice"),
    ("bert", "token_labels"),
    ("bert", "spans"),
    ("bert", "masked_lm"),
    ("gpt2", "causal_lm"),
    ("gpt2", "classification"),
    ("bart", "seq2seq"),
]


class Bag(BagOfEmbeddings):
    """With the loss of its labels."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = super().forward(input_ids, attention_mask)
        return SimpleNamespace(logits=logits, loss=None if labels is None else losses_of(logits, labels).mean())


class Quadratic(Bag):
    """Predicts one number, linear in the embeddings, so that its squared error is quadratic."""

    def body(self, embeds: Tensor, attention_mask: Tensor) -> Tensor:
        return self.out(embeds * attention_mask.unsqueeze(-1)).sum(1)


class Linear(Quadratic):
    """Two classes, the wrong one so far ahead that the cross-entropy of label 0 is the difference of the logits."""

    def body(self, embeds: Tensor, attention_mask: Tensor) -> Tensor:
        return super().body(embeds, attention_mask) + torch.tensor([0.0, 1000.0], dtype=embeds.dtype)


def losses_of(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) losses by their definitions."""
    if labels.is_floating_point():
        return (logits.squeeze(-1) - labels) ** 2
    return logits.logsumexp(-1) - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def objective_of(model: nn.Module, config: AdversarialConfig, head: str = "classification") -> AdversarialObjective:
    return AdversarialObjective(model, config.replace(modules=("embed",)), head=head)


def first_noise(batch: dict, embeds: Tensor, config: AdversarialConfig, seed: Tensor) -> Tensor:
    std = torch.tensor(config.std).item()
    options = {"std": std, "mask": batch["attention_mask"], "distribution": config.distribution}
    return reference_noise.initial_delta(embeds.shape, seed, embeds.dtype, stream=0, sample_offset=0, **options)


def bag_by_hand(model: Bag, batch: dict, config: AdversarialConfig, seed: Tensor) -> Tensor:
    """The loss of one step in plain PyTorch."""
    mask, labels = batch["attention_mask"], batch["labels"]
    embeds = model.embed(batch["input_ids"])
    clean = losses_of(model.body(embeds, mask), labels)
    (slope,) = torch.autograd.grad(clean.sum(), embeds, create_graph=True)
    delta = first_noise(batch, embeds, config, seed)
    for _ in range(config.steps):
        delta.requires_grad_()
        reached = losses_of(model.body(embeds.detach() + delta, mask), labels)
        gamma = (reached - clean.detach() - (delta * slope.detach()).sum((1, 2))).abs()
        (grad,) = torch.autograd.grad(gamma.sum(), delta)
        sizes = torch.tensor([config.step_size, config.epsilon]).tolist()  # as fp32 has them
        _, delta, _ = reference_ascent.projected_ascent(
            embeds.detach(),
            grad,
            delta.detach(),
            step_size=sizes[0],
            epsilon=sizes[1],
            norm=config.norm,
            normalize=config.normalize,
            level=config.level,
            mask=mask,
        )
    along = (delta * slope).sum((1, 2))
    gamma = (losses_of(model.body(embeds + delta, mask), labels) - clean - along).abs()
    return clean.mean() + config.linearity * gamma.mean() + config.linearity_gradient * along.abs().mean()


@pytest.fixture
def deltas(monkeypatch) -> list[Tensor]:
    """The perturbation of every final pass: the last of each step, in order."""
    seen: list[Tensor] = []
    original = Perturbation.perturb

    def perturb(self: Perturbation, index: int, output: Tensor, **options: bool) -> Tensor:
        perturbed = original(self, index, output, **options)
        seen.append((perturbed - output).detach())
        return perturbed

    monkeypatch.setattr(Perturbation, "perturb", perturb)
    return seen


def compare(ours: Gradients, expected: Gradients, *, rtol: float = 1e-8, atol: float = 1e-12) -> None:
    assert expected.flat().abs().sum() > 0
    for name, grad in expected.values.items():
        other = ours.values[name]
        if grad is None or other is None:
            assert not any(g is not None and g.any() for g in (grad, other)), name
            continue
        torch.testing.assert_close(other, grad, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


BALLS = {f"steps-{steps}": NEAR.replace(steps=steps) for steps in range(4)} | {
    "l2": NEAR.replace(norm="l2", normalize="l2", step_size=0.2, epsilon=0.3),
    "normal": NEAR.replace(distribution="normal", normalize="linf", level="token"),
    "gamma-alone": NEAR.replace(linearity_gradient=0.0, linearity=0.5),
    "gradient-alone": NEAR.replace(linearity=0.0),
}


@pytest.mark.parametrize("head", ["classification", "regression"])
@pytest.mark.parametrize("case", BALLS)
def test_a_step_is_the_one_written_by_hand(case, head):
    regression = head == "regression"
    batch = tiny_models.regression_batch() if regression else tiny_models.classification_batch()
    batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    model, seed = Bag(labels=1 if regression else 3).double(), torch.tensor([977])
    output = objective_of(model, BALLS[case], head).forward(batch, seed=seed)
    output.loss.backward()
    ours = Gradients.of(model)
    model.zero_grad()
    expected = bag_by_hand(model, batch, BALLS[case], seed)
    expected.backward()
    torch.testing.assert_close(output.loss.detach(), expected.detach(), rtol=1e-12, atol=0)
    compare(ours, Gradients.of(model))
    torch.testing.assert_close(output.task_loss, model(**batch).loss.detach(), rtol=1e-15, atol=0)


def test_a_linear_loss_has_no_gamma_and_no_gradient_of_it():
    model = Linear(labels=2).double()
    batch = {**tiny_models.tokens(), "labels": torch.zeros(4, dtype=torch.long)}
    objective = objective_of(model, NEAR.replace(clean_weight=0.0, linearity=1.0, linearity_gradient=0.0, steps=0))
    output = objective.forward(batch, seed=torch.tensor([3]))
    output.loss.backward()
    assert output.task_loss > 100
    assert output.loss.abs() < 1e-11
    assert Gradients.of(model).flat().abs().max() < 1e-12


def test_a_quadratic_loss_has_half_its_curvature(deltas):
    model = Quadratic(labels=1).double()
    batch = tiny_models.regression_batch()
    batch["labels"] = batch["labels"].double()
    config = NEAR.replace(clean_weight=0.0, linearity=1.0, linearity_gradient=0.0, signal_check_interval=1, steps=4)
    objective = objective_of(model, config, "regression")
    output = objective(**batch)
    output.loss.backward()
    # l = (w . e + b - y)^2, so H = 2 w w^T and delta^T H delta / 2 = (w . delta)^2, with gradient 2 (w . delta) delta
    (delta,) = deltas
    products = (delta @ model.out.weight.detach()[0]).sum(1)
    torch.testing.assert_close(output.loss.detach(), (products**2).mean(), rtol=1e-9, atol=0)
    expected = (2 * products[:, None] * delta.sum(1)).mean(0)
    torch.testing.assert_close(model.out.weight.grad[0], expected, rtol=1e-9, atol=1e-14)
    for parameter in (model.out.bias.grad, model.embed.weight.grad):
        assert parameter.abs().max() < 1e-14
    figures = objective.telemetry.read()
    assert figures["signal_ratio"] == pytest.approx(4, rel=1e-6)
    assert figures["linearity"] == pytest.approx(output.loss.item(), rel=1e-6)
    # along the sign every element reaches its corner of the ball
    corner = (0.1 * model.out.weight.abs().sum() * batch["attention_mask"].sum(1)) ** 2
    assert figures["linearity"] == pytest.approx(corner.mean().item(), rel=1e-6)
    assert figures["ascent_gain"] > 1


def next_token_loss(logits: Tensor, labels: Tensor, vocabulary: int | None = None, **_: object) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def sample_by_sample(model: nn.Module, batch: dict, deltas: list[Tensor], config: AdversarialConfig) -> Tensor:
    """The loss of a step at known perturbations, each sample a batch of its own with the model's own loss."""
    sites = perturbed_sites(model, side=config.side)
    count = batch["labels" if "labels" in batch else "start_positions"].shape[0]
    clean_losses, gammas, slopes = [], [], []
    for index in range(count):
        sample = {name: x[index : index + 1] for name, x in batch.items()}
        own = [delta.view(count, -1, *delta.shape[1:])[index] for delta in deltas]
        embeds = []

        def loss_with(replace, sample=sample):
            handles = [
                site.module.register_forward_hook(lambda _m, _a, output, at=at: replace(at, output))
                for at, site in enumerate(sites)
            ]
            loss = model(**sample).loss
            for handle in handles:
                handle.remove()
            return loss

        clean = loss_with(lambda at, output, embeds=embeds: embeds.append(output))
        grads = torch.autograd.grad(clean, embeds, create_graph=True)
        slope = sum((delta * grad).sum() for delta, grad in zip(own, grads, strict=True))
        reached = loss_with(lambda at, output, own=own: output + own[at])
        clean_losses.append(clean)
        slopes.append(slope.abs())
        gammas.append((reached - clean - slope).abs())
    terms = (config.linearity, gammas), (config.linearity_gradient, slopes)
    counts = labels_of_each(batch)
    return torch.stack([weight * (torch.stack(values) * counts).sum() / counts.sum() for weight, values in terms]).sum()


def labels_of_each(batch: dict[str, Tensor]) -> Tensor:
    """(B,) how many labels each sample's loss is the mean of; a causal model predicts none at its first position."""
    labels = batch.get("labels")
    if labels is None or labels.dim() == 1:
        return torch.ones(len(batch["input_ids"]))
    return (labels != -100).sum(1)


def made(family: str, task: str) -> tuple[nn.Module, dict]:
    """A model and a batch in float64; an answer's padding is left out here, but not by a model's own loss."""
    batch = tiny_models.batch(task)
    if task == "spans":
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        batch["start_positions"][2], batch["end_positions"][2] = 1, 3
    batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    return tiny_models.make(family, task, dtype=torch.float64), batch


@pytest.mark.filterwarnings("ignore:.*trained through its logits")
@pytest.mark.parametrize(("family", "task"), TASKS, ids=["-".join(pair) for pair in TASKS])
def test_transformers_are_the_same_sample_by_sample(family, task, deltas):
    model, batch = made(family, task)
    assert model.config._attn_implementation == "sdpa"
    by_hand = copy.deepcopy(model)
    by_hand.set_attn_implementation("eager")
    if task == "causal_lm":
        by_hand.loss_function = next_token_loss  # their own computes in fp32
    config = AdversarialConfig.llr(clean_weight=0.0)
    objective = AdversarialObjective(model, config)
    output = objective(**batch)
    output.loss.backward()
    objective.remove_hooks()
    expected = sample_by_sample(by_hand, batch, deltas, config)
    expected.backward()
    torch.testing.assert_close(output.loss.detach(), expected.detach(), rtol=1e-8, atol=1e-12)
    compare(Gradients.of(model), Gradients.of(by_hand), rtol=1e-6, atol=1e-10)


def test_both_sides_of_an_encoder_decoder(deltas):
    model, batch = made("bart", "seq2seq")
    config = AdversarialConfig.llr(clean_weight=0.0, side="both", fused_head=False)
    objective = AdversarialObjective(model, config)
    output = objective(**batch)
    objective.remove_hooks()
    by_hand = copy.deepcopy(model)
    by_hand.set_attn_implementation("eager")
    assert len(deltas) == 2
    expected = sample_by_sample(by_hand, batch, deltas, config)
    torch.testing.assert_close(output.loss.detach(), expected.detach(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_gradient_is_that_of_finite_differences(family):
    model, batch = made(family, "classification")
    torch.manual_seed(0)
    delta = 0.05 * torch.randn(*batch["input_ids"].shape, 16, dtype=torch.float64)
    objective = AdversarialObjective(model, NEAR.replace(steps=0))

    def loss() -> Tensor:
        return objective.forward(batch, delta=[delta]).loss

    loss().backward()
    gradients = Gradients.of(model)
    for name, parameter in model.named_parameters():
        if gradients.values[name] is None:
            continue
        direction = torch.randn_like(parameter)
        size, ends = 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * size * direction)
            ends.append(loss().detach())
            with torch.no_grad():
                parameter.sub_(sign * size * direction)
        measured = (ends[0] - ends[1]) / (2 * size)
        expected = (gradients.values[name] * direction).sum()
        torch.testing.assert_close(expected, measured, rtol=1e-5, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("config", [AdversarialConfig.llr(), NEAR.replace(norm="l2", normalize="l2", epsilon=0.2)])
def test_the_perturbation_lies_in_the_ball_and_on_no_padding(config, deltas):
    model, batch = tiny_models.bert(0.1), tiny_models.classification_batch()
    objective = AdversarialObjective(model, config)
    objective(**batch).loss.backward()
    (delta,), padding = deltas, batch["attention_mask"] == 0
    assert padding.any()
    assert not delta[padding].any()
    if config.norm == "l2":
        assert (delta.flatten(1).norm(dim=1) <= 0.2 * (1 + 1e-5)).all()
    else:
        words = model.bert.embeddings.word_embeddings(batch["input_ids"]).detach()
        squares = torch.where(padding.unsqueeze(-1), 0, words**2).sum((1, 2))
        radius = 0.1 * (squares / (16 * batch["attention_mask"].sum(1))).sqrt()
        largest = delta.abs().flatten(1).amax(1)
        assert (largest <= radius * (1 + 1e-5)).all()
        assert (largest >= radius * (1 - 1e-5)).all()
    assert objective.telemetry.read()["ascent_gain"] > 2


def test_more_padding_changes_nothing():
    batch = tiny_models.classification_batch()
    results = []
    for padded in (batch, tiny_models.with_more_padding(batch)):
        model = tiny_models.bert().double()
        loss = AdversarialObjective(model, NEAR).forward(padded, seed=torch.tensor([5])).loss
        loss.backward()
        results.append((loss.detach(), Gradients.of(model)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-10, atol=0)
    compare(results[1][1], results[0][1], atol=1e-11)


def test_shared_dropout_leaves_no_gamma_where_nothing_moves():
    batch = tiny_models.classification_batch()
    still = [torch.zeros(4, 7, 16)]
    found = {}
    for dropout in ("shared", "independent"):
        objective = AdversarialObjective(tiny_models.bert(0.3), NEAR.replace(dropout=dropout, steps=0))
        objective.forward(batch, delta=still)
        found[dropout] = objective.telemetry.read()["linearity"]
    assert found["shared"] == 0
    assert found["independent"] > 1e-3


def test_a_model_may_change_its_embeddings_in_place_and_they_may_be_frozen():
    class InPlace(Bag):
        def body(self, embeds: Tensor, attention_mask: Tensor) -> Tensor:
            embeds.mul_(1.5)
            return super().body(embeds, attention_mask)

    class Plain(Bag):
        def body(self, embeds: Tensor, attention_mask: Tensor) -> Tensor:
            return super().body(embeds * 1.5, attention_mask)

    batch, seed = tiny_models.classification_batch(), torch.tensor([8])
    gradients = []
    for kind, frozen in ((Plain, False), (InPlace, False), (InPlace, True)):
        model = kind().double()
        model.embed.requires_grad_(not frozen)
        objective_of(model, NEAR).forward(batch, seed=seed).loss.backward()
        gradients.append(Gradients.of(model))
    compare(gradients[1], gradients[0], rtol=1e-12)
    assert gradients[2].values.pop("embed.weight") is None
    gradients[0].values.pop("embed.weight")
    compare(gradients[2], gradients[0], rtol=1e-12)


def test_a_step_has_two_forwards_and_one_for_each_ascent():
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for steps in (0, 1, 3):
        calls.clear()
        AdversarialObjective(model, NEAR.replace(steps=steps))(**batch)
        assert len(calls) == steps + 2


def test_the_ascent_leaves_no_gradients_and_no_graph_is_needed():
    model, batch, seed = tiny_models.bert(), tiny_models.classification_batch(), torch.tensor([1])
    objective = AdversarialObjective(model, NEAR)
    loss = objective.forward(batch, seed=seed).loss
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(objective.forward(batch, seed=seed).loss, loss)


def test_weights_follow_the_schedule_and_the_teacher_joins():
    batch, seed = tiny_models.classification_batch(), torch.tensor([2])
    config = NEAR.replace(linearity_gradient=0.0, alpha_schedule=((0.0, 0.0), (1.0, 1.0)), start=2)
    model = tiny_models.bert().double()
    objective = AdversarialObjective(model, config)
    expected = AdversarialObjective(model, NEAR.replace(linearity_gradient=0.0)).forward(batch, seed=seed)
    whole = expected.loss - expected.task_loss
    for step, share in ((1, 0.0), (5, 0.5), (10, 1.0)):
        objective.set_progress(step, 10)
        output = objective.forward(batch, seed=seed)
        torch.testing.assert_close(output.loss - output.task_loss, share * whole, rtol=1e-9, atol=1e-15)

    objective = AdversarialObjective(model, NEAR.replace(linearity_gradient=0.0, proximal=2.0))
    objective.follow(torch.optim.SGD(model.parameters()))
    with torch.no_grad():
        model.classifier.bias.add_(torch.tensor([0.0, 0.0, 1.0]))
    output = objective.forward(batch, seed=seed)
    figures = objective.telemetry.read()
    assert output.proximal > 0.01
    total = output.task_loss + 2 * output.proximal + 4 * figures["linearity"]
    torch.testing.assert_close(output.loss.detach(), total, rtol=1e-6, atol=0)
    assert figures["proximal"] == pytest.approx(output.proximal.item(), rel=1e-6)


def test_checkpointed_layers_have_their_gradients():
    gradients = []
    for checkpointed in (False, True):
        model = tiny_models.bert(0.2)
        model.set_attn_implementation("eager")
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        AdversarialObjective(model, NEAR).forward(tiny_models.classification_batch()).loss.backward()
        gradients.append(Gradients.of(model))
    compare(*gradients, rtol=1e-5, atol=1e-8)


def test_what_belongs_to_a_sample_with_several_rows():
    embeds = torch.zeros(6, 2, 1)
    slopes = torch.arange(6.0).repeat_interleave(2).view(6, 2, 1)
    expansion = Expansion(torch.tensor([10.0, 20.0]), [embeds], [slopes])
    assert expansion.over_rows(torch.tensor([1.0, -1.0]), 0).flatten().tolist() == [1, 1, 1, -1, -1, -1]
    points = [torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0]).view(6, 1, 1).expand(6, 2, 1)]
    assert expansion.slope(points).tolist() == [2 * (0 + 1 + 2), 2 * 2 * (3 + 4 + 5)]
    assert expansion.remainder(torch.tensor([17.0, 70.0]), points).tolist() == [1, 2]
