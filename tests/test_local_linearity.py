"""Local linearity against a step written out, analytic cases, and what its passes may and may not touch."""

from types import SimpleNamespace

import pytest
import tiny_models
import torch
from linearity import NEAR, compare, watched_deltas
from tiny_models import BagOfEmbeddings, Gradients
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.adversarial.local_linearity import Expansion
from alum_kernels.backends.reference import noise_init as reference_noise
from alum_kernels.backends.reference import projected_ascent as reference_ascent


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


def test_a_quadratic_loss_has_half_its_curvature(monkeypatch):
    deltas = watched_deltas(monkeypatch)
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


@pytest.mark.parametrize("config", [AdversarialConfig.llr(), NEAR.replace(norm="l2", normalize="l2", epsilon=0.2)])
def test_the_perturbation_lies_in_the_ball_and_on_no_padding(config, monkeypatch):
    deltas = watched_deltas(monkeypatch)
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
