"""The teacher of the Bregman proximal term: what it is after any number of steps, and what it predicts."""

import copy

import pytest
import tiny_models
import torch
from method_cases import example
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.adversarial.proximal import BregmanProximal

PLAIN = AdversarialConfig(alpha=0.0, proximal=1.0, fused_head=False)
PACE = 0.3


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def teacher_of(objective: AdversarialObjective) -> dict[str, Tensor]:
    return objective.state_dict()["proximal"]["teacher"]


def objective_with(model: nn.Module, config: AdversarialConfig) -> tuple[AdversarialObjective, torch.optim.Optimizer]:
    objective = AdversarialObjective(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=PACE)
    objective.follow(optimizer)
    return objective, optimizer


def train(objective: AdversarialObjective, optimizer: torch.optim.Optimizer, batch: dict, micro_batches: int = 1):
    for _ in range(micro_batches):
        objective.backward(batch, scale=1 / micro_batches)
    optimizer.step()
    optimizer.zero_grad()


def model_and_batch(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, dict]:
    model, batch = example("bert", "classification")
    return copy.deepcopy(model).to(dtype), batch


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_without_momentum_the_teacher_is_the_model_every_s_steps(interval):
    model, batch = model_and_batch()
    objective, optimizer = objective_with(model, PLAIN.replace(proximal_interval=interval))
    last = trained(model)
    for step in range(1, 7):
        train(objective, optimizer, batch)
        if step % interval == 0:
            last = trained(model)
        teacher = teacher_of(objective)
        assert set(teacher) == set(last)
        for name, weight in teacher.items():
            assert torch.equal(weight, last[name]), (step, name)


def test_the_vanilla_term_begins_anew_after_every_s_steps():
    model, batch = model_and_batch()
    objective, optimizer = objective_with(model, PLAIN.replace(proximal_interval=2))
    distances = []
    for _ in range(5):
        distances.append(objective(**batch).proximal.item())
        train(objective, optimizer, batch)
    assert distances[0] == distances[2] == distances[4] == 0
    assert min(distances[1], distances[3]) > 1e-8


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("momentum", [0.5, 0.99])
def test_the_momentum_teacher_is_the_average_by_hand(momentum, interval):
    model, batch = model_and_batch()
    objective, optimizer = objective_with(
        model, PLAIN.replace(proximal_momentum=momentum, proximal_interval=interval, proximal=3.0)
    )
    average = trained(model)
    for step in range(1, 8):
        train(objective, optimizer, batch)
        if step % interval == 0:
            own = trained(model)
            average = {name: momentum * weight + (1 - momentum) * own[name] for name, weight in average.items()}
        for name, weight in teacher_of(objective).items():
            torch.testing.assert_close(weight, average[name], rtol=1e-13, atol=1e-15)
    assert (average["classifier.weight"] - trained(model)["classifier.weight"]).abs().max() > 1e-4


def test_the_momentum_has_a_schedule():
    model, batch = model_and_batch()
    points = ((0.5, 0.9), (0.5, 0.5))
    objective, optimizer = objective_with(model, PLAIN.replace(proximal_momentum=points))
    average = trained(model)
    for done in range(4):
        objective.set_progress(done, 4)
        train(objective, optimizer, batch)
        beta, own = 0.9 if done < 2 else 0.5, trained(model)
        average = {name: beta * weight + (1 - beta) * own[name] for name, weight in average.items()}
    for name, weight in teacher_of(objective).items():
        torch.testing.assert_close(weight, average[name], rtol=1e-13, atol=1e-15)


def test_the_teacher_of_a_bf16_model_is_fp32_and_moves():
    model, batch = model_and_batch(torch.bfloat16)
    momentum = 0.999
    objective, optimizer = objective_with(model, PLAIN.replace(proximal_momentum=momentum))
    first = {name: weight.double() for name, weight in trained(model).items()}
    average, in_bf16 = dict(first), trained(model)
    for _ in range(5):
        train(objective, optimizer, batch)
        for name, weight in trained(model).items():
            average[name] = momentum * average[name] + (1 - momentum) * weight.double()
            in_bf16[name] = momentum * in_bf16[name] + (1 - momentum) * weight
    teacher = teacher_of(objective)
    name = "classifier.weight"
    assert {weight.dtype for weight in teacher.values()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    moved = (average[name] - first[name]).abs()
    assert moved.max() > 1e-4
    for own, weight in teacher.items():
        torch.testing.assert_close(weight.double(), average[own], rtol=1e-6, atol=1e-7)
    # in bf16 it is far from the average
    assert (in_bf16[name].double() - average[name]).abs().max() > 0.3 * moved.max()
    assert objective(**batch).proximal.isfinite()


@pytest.mark.parametrize(("family", "task"), [("bert", "masked_lm"), ("gpt2", "causal_lm"), ("bart", "seq2seq")])
def test_tied_weights_are_one_in_the_teacher(family, task):
    model, batch = tiny_models.make(family, task, dtype=torch.float64), tiny_models.batch(task)
    words, projection = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert words is projection
    teacher, first = BregmanProximal(model, 1, lambda: 0.5), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    with torch.no_grad():
        expected, moved = first(**batch).logits, model(**batch).logits
        assert torch.equal(teacher.forward(batch).logits, expected)
        assert (moved - expected).abs().max() > 1e-2
    teacher.step()
    with torch.no_grad():
        for average, weight in zip(first.parameters(), model.parameters(), strict=True):
            average += 0.5 * (weight - average)
        torch.testing.assert_close(teacher.forward(batch).logits, first(**batch).logits, rtol=1e-10, atol=1e-12)
    assert model.get_input_embeddings().weight is words


def test_frozen_parameters_are_the_models_own():
    model, batch = model_and_batch()
    model.bert.embeddings.requires_grad_(False)
    objective, optimizer = objective_with(model, PLAIN)
    train(objective, optimizer, batch)
    assert set(teacher_of(objective)) == set(trained(model))
    assert not any("embeddings" in name for name in teacher_of(objective))
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight += 1.0
    assert objective(**batch).proximal == 0


def test_the_teacher_gets_no_gradient_and_changes_nothing_by_itself():
    model, batch = model_and_batch()
    objective, _ = objective_with(model, PLAIN.replace(proximal_momentum=0.5))
    before = {name: weight.clone() for name, weight in teacher_of(objective).items()}
    objective.backward(batch)
    for name, weight in teacher_of(objective).items():
        assert not weight.requires_grad
        assert torch.equal(weight, before[name])


def test_accumulated_batches_are_one_step_of_the_teacher():
    results = []
    for micro_batches in (1, 3):
        model, batch = model_and_batch()
        config = PLAIN.replace(proximal_momentum=0.5, proximal_interval=2)
        objective, optimizer = objective_with(model, config)
        for _ in range(3):
            train(objective, optimizer, batch, micro_batches)
        assert objective.state_dict()["proximal"]["steps"] == 3
        results.append(teacher_of(objective))
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("when", ["before", "after", "between"])
def test_a_checkpoint_goes_on_with_the_teacher(when):
    """Loaded before an optimizer is followed, after it, or by an objective that followed another one until then."""
    config = PLAIN.replace(proximal_momentum=0.7, proximal_interval=2, proximal=2.0)
    model, batch = model_and_batch()
    objective, optimizer = objective_with(model, config)
    for _ in range(3):
        train(objective, optimizer, batch)
    saved = copy.deepcopy((model.state_dict(), objective.state_dict()))
    for _ in range(3):
        train(objective, optimizer, batch)

    resumed, _ = model_and_batch()
    resumed.load_state_dict(saved[0])
    other = AdversarialObjective(resumed, config)
    steps = torch.optim.SGD(resumed.parameters(), lr=PACE)
    if when == "between":
        earlier = torch.optim.SGD(resumed.parameters(), lr=PACE)
        other.follow(earlier)
        train(other, earlier, batch)
        resumed.load_state_dict(saved[0])
        other.load_state_dict(saved[1])
        other.follow(steps)
    elif when == "before":
        other.load_state_dict(saved[1])
        kept = other.state_dict()["proximal"]["teacher"]  # what nobody has taken up yet is saved as it came
        assert all(torch.equal(weight, saved[1]["proximal"]["teacher"][name]) for name, weight in kept.items())
        other.follow(steps)
    else:
        other.follow(steps)
        other.load_state_dict(saved[1])
    for _ in range(3):
        train(other, steps, batch)
    for own, theirs in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(own, theirs)
    for name, weight in teacher_of(objective).items():
        assert torch.equal(teacher_of(other)[name], weight)


def test_a_checkpoint_does_not_share_memory_with_the_teacher():
    model, batch = model_and_batch()
    objective, optimizer = objective_with(model, PLAIN.replace(proximal_momentum=0.5))
    state = objective.state_dict()
    before = {name: weight.clone() for name, weight in state["proximal"]["teacher"].items()}
    train(objective, optimizer, batch)
    for name, weight in state["proximal"]["teacher"].items():
        assert torch.equal(weight, before[name])


def test_the_teacher_of_another_model_is_refused():
    model, _ = model_and_batch()
    teacher = BregmanProximal(model, 1, lambda: 0.0)
    state = teacher.state_dict()
    state["teacher"]["classifier.scale"] = state["teacher"].pop("classifier.bias")
    with pytest.raises(ValueError, match=r"^teacher: .* got others: classifier\.bias, classifier\.scale"):
        teacher.load_state_dict(state)


def test_following_is_asked_for_and_needs_a_weight():
    model, batch = model_and_batch()
    with pytest.raises(ValueError, match=r"^proximal: expected an optimizer .*\.follow\(optimizer\)"):
        AdversarialObjective(model, PLAIN)(**batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=PACE)
    with pytest.raises(ValueError, match=r"^proximal: expected a weight > 0 where a teacher is to follow, got 0"):
        AdversarialObjective(model, PLAIN.replace(proximal=0.0, alpha=1.0)).follow(optimizer)


def test_following_again_begins_anew_and_leaves_nothing_behind():
    model = tiny_models.bert().double()
    objective = AdversarialObjective(model, PLAIN)
    batch = tiny_models.classification_batch()
    first = torch.optim.SGD(model.parameters(), lr=0.5)
    objective.follow(first)
    for _ in range(2):
        objective(**batch).loss.backward()
        first.step()
    objective.load_state_dict(objective.state_dict())
    second = torch.optim.SGD(model.parameters(), lr=0.5)
    objective.follow(second)
    assert not first._optimizer_step_post_hooks
    assert objective(**batch).proximal == 0
    for _ in range(3):
        objective.follow(second)
    assert len(second._optimizer_step_post_hooks) == 1
    objective.remove_hooks()
    assert not second._optimizer_step_post_hooks


def test_a_parameter_that_is_trained_later_has_a_teacher_from_then_on():
    model = tiny_models.bert().double()
    model.classifier.requires_grad_(False)
    objective = AdversarialObjective(model, PLAIN)
    batch, optimizer = tiny_models.classification_batch(), torch.optim.SGD(model.parameters(), lr=0.5)
    objective.follow(optimizer)
    model.classifier.requires_grad_(True)
    assert objective(**batch).proximal == 0
    with torch.no_grad():
        model.classifier.weight[0].add_(1.0)
    assert objective(**batch).proximal > 0


def test_a_step_that_is_not_taken_leaves_the_teacher():
    """As a gradient scaler that found an overflow."""
    model, batch = model_and_batch()
    objective, optimizer = objective_with(model, PLAIN)
    first = trained(model)
    objective.backward(batch)
    optimizer.zero_grad()
    assert objective.state_dict()["proximal"]["steps"] == 0
    assert all(torch.equal(weight, first[name]) for name, weight in teacher_of(objective).items())


def test_the_term_holds_the_model_back():
    """Twenty steps with a strong term end nearer to where they began."""
    distances = []
    for weight in (1e-9, 10.0):
        model, batch = model_and_batch()
        first = copy.deepcopy(model)
        objective, optimizer = objective_with(model, PLAIN.replace(proximal=weight, proximal_momentum=1.0))
        optimizer.param_groups[0]["lr"] = 0.01
        for _ in range(20):
            train(objective, optimizer, batch)
        with torch.no_grad():
            distances.append(nn.functional.mse_loss(model(**batch).logits, first(**batch).logits))
    assert distances[1] < 0.5 * distances[0]
