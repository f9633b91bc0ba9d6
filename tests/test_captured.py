"""Captured steps: equal to the step as it runs, with new noise and masks each time, and falling back with a reason."""

import copy

import pytest
import tiny_models
import torch
from method_cases import MOVED
from recorded_graphs import RecordedGraphs

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.adversarial.captured import MOST_GRAPHS, WARM_STEPS, CapturedStep
from alum_kernels.adversarial.cuda_graphs import CaptureError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def graphs_of(model: torch.nn.Module) -> RecordedGraphs | None:
    """CUDA graphs where the model is on a GPU, recorded operations on the CPU."""
    return None if next(model.parameters()).is_cuda else RecordedGraphs()


def make(task: str, dropout: float, device: str) -> torch.nn.Module:
    kind = tiny_models.bert_masked_lm if task == "masked_lm" else tiny_models.bert
    return kind(dropout).to(device).train()


def batch_of(task: str, seed: int, device: str, samples: int = 4) -> dict:
    make_batch = tiny_models.masked_lm_batch if task == "masked_lm" else tiny_models.classification_batch
    return {name: tensor.to(device) for name, tensor in make_batch(samples, seed=seed).items()}


def train(config: AdversarialConfig, task: str, steps: int, device: str, *, captured: bool):
    """Parameters, losses and telemetry after some steps of SGD with momentum."""
    model = make(task, 0.1, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    objective = AdversarialObjective(model, config)
    step = CapturedStep(objective, batch_of(task, 0, device), optimizer, graphs=graphs_of(model)) if captured else None
    torch.manual_seed(7)
    losses = []
    for turn in range(steps):
        batch = batch_of(task, turn % 5, device)
        if captured:
            losses.append(step(batch)["loss"])
        else:
            optimizer.zero_grad()
            losses.append(objective.backward(batch)["loss"])
            optimizer.step()
    if captured:
        assert step.reason is None
    return model.state_dict(), torch.stack(losses).float().cpu(), objective.telemetry.read()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("classification", {}),
        ("classification", {"steps": 2, "normalize": "sign"}),
        ("classification", {"adversarial_fraction": 0.5}),
        ("classification", {"memory": "low"}),
        ("classification", {"dropout": "independent"}),
        ("classification", {"ascent_depth": 1, "dropout": "off"}),
        ("classification", {"adversarial_interval": 2, "signal_check_interval": 3}),
        ("masked_lm", {"labelled_capacity": 0.6}),
        ("masked_lm", {"labelled_capacity": 0.6, "adversarial_fraction": 0.5, "positions": "all"}),
        ("masked_lm", {"fused_head": False}),
    ],
    ids=str,
)
def test_captured_steps_are_the_steps(task, changes, device):
    config = MOVED.replace(**changes)
    expected, losses, figures = train(config, task, 20, device, captured=False)
    found, captured_losses, captured_figures = train(config, task, 20, device, captured=True)
    torch.testing.assert_close(captured_losses, losses, rtol=1e-6, atol=0)
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-5, atol=1e-7)
    assert captured_figures == pytest.approx(figures, rel=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_two_hundred_steps_are_the_steps(device):
    expected, losses, _ = train(MOVED, "classification", 200, device, captured=False)
    found, captured_losses, _ = train(MOVED, "classification", 200, device, captured=True)
    torch.testing.assert_close(captured_losses, losses, rtol=1e-4, atol=0)
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_every_replay_draws_new_noise_and_new_masks(device):
    batch = batch_of("classification", 0, device)
    for config, dropout, figure in ((MOVED, 0.0, "divergence"), (MOVED.replace(alpha=1e-9), 0.5, "task_loss")):
        model = make("classification", dropout, device)
        step = CapturedStep(AdversarialObjective(model, config), batch, graphs=graphs_of(model))
        figures = [float(step(batch)[figure]) for _ in range(WARM_STEPS + 4)]
        assert len(set(figures)) == len(figures)


@pytest.mark.parametrize("device", DEVICES)
def test_shared_masks_are_shared_in_a_replay(device):
    still = MOVED.replace(std=0.0, step_size=0.0, epsilon=0.0)
    model, batch = make("classification", 0.5, device), batch_of("classification", 0, device)
    step = CapturedStep(AdversarialObjective(model, still), batch, graphs=graphs_of(model))
    assert [float(step(batch)["divergence"]) for _ in range(WARM_STEPS + 3)] == [0.0] * (WARM_STEPS + 3)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_those_of_the_step_whatever_was_there(device):
    model = make("classification", 0.0, device)
    other = copy.deepcopy(model)
    batches = [batch_of("classification", seed, device) for seed in range(WARM_STEPS + 3)]
    step = CapturedStep(AdversarialObjective(model, MOVED), batches[0], graphs=graphs_of(model))
    plain = AdversarialObjective(other, MOVED)
    for turn, batch in enumerate(batches):
        if turn % 2:
            model.zero_grad(set_to_none=True)
        step(batch, scale=0.5)
        other.zero_grad()
        plain.backward(batch, scale=0.5)
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-8)


def test_each_shape_has_a_graph_and_too_many_have_none():
    model, graphs = make("classification", 0.0, "cpu"), RecordedGraphs()
    step = CapturedStep(AdversarialObjective(model, MOVED), batch_of("classification", 0, "cpu"), graphs=graphs)
    for samples in range(1, MOST_GRAPHS + 1):
        for _ in range(WARM_STEPS + 2):
            step(batch_of("classification", 0, "cpu", samples))
    assert (graphs.recorded, graphs.replayed) == (MOST_GRAPHS, 2 * MOST_GRAPHS)
    another = batch_of("classification", 0, "cpu", MOST_GRAPHS + 1)
    for _ in range(WARM_STEPS):
        assert torch.isfinite(step(another)["loss"])
    with pytest.warns(UserWarning, match=f"{MOST_GRAPHS} shapes of batches are captured, others run as they are"):
        step(another)
    step(batch_of("classification", 0, "cpu", 1))
    assert (graphs.recorded, graphs.replayed, step.reason) == (MOST_GRAPHS, 2 * MOST_GRAPHS + 1, None)


@pytest.mark.parametrize(
    ("config", "reason", "needs"),
    [
        (MOVED.replace(alpha_schedule=((0.0, 0.0), (1.0, 1.0))), "alpha_schedule", {}),
        (MOVED.replace(proximal=1.0), "teacher", {}),
        (MOVED.replace(delta_lifetime=2), "delta_lifetime", {"samples": range(4)}),
        (MOVED.replace(ascent_depth=1), "ascent_depth", {}),
        (AdversarialConfig.freelb(), "freelb trains on every pass", {}),
        (AdversarialConfig.freeat(), "freeat trains on every pass", {"update": lambda: None}),
        (AdversarialConfig.llr(), "llr differentiates twice", {}),
    ],
)
def test_what_is_not_captured_says_why_and_runs(config, reason, needs):
    model, batch = make("classification", 0.1, "cpu"), batch_of("classification", 0, "cpu")
    objective = AdversarialObjective(model, config)
    objective.set_progress(0, 10)
    if config.proximal:
        objective.follow(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.warns(UserWarning, match=f"not captured: .*{reason}"):
        step = CapturedStep(objective, batch, graphs=RecordedGraphs())
    assert reason in step.reason
    assert step(batch, **needs)["loss"] > 0
    assert tiny_models.Gradients.of(model).flat().abs().sum() > 0


def test_without_a_gpu_the_step_runs_as_it_is():
    model, batch = make("classification", 0.1, "cpu"), batch_of("classification", 0, "cpu")
    other = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="the model is on cpu, and CUDA graphs need a GPU"):
        step = AdversarialObjective(model, MOVED).capture(batch)
    torch.manual_seed(0)
    figures = step(batch)
    torch.manual_seed(0)
    assert figures == AdversarialObjective(other, MOVED).backward(batch)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


class Reads(torch.nn.Module):
    """A layer whose host reads a number from the device."""

    def forward(self, hidden: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return hidden if hidden.sum().item() < 1e9 else 2 * hidden


def test_reading_a_number_from_the_device_ends_the_capture():
    model, batch = make("classification", 0.0, "cpu"), batch_of("classification", 0, "cpu")
    model.bert.encoder.layer.append(Reads())
    step = CapturedStep(AdversarialObjective(model, MOVED), batch, graphs=RecordedGraphs())
    for _ in range(WARM_STEPS):
        step(batch)
    with pytest.raises(CaptureError, match="operation not permitted when stream is capturing"):
        step(batch)


def test_an_optimizer_that_a_graph_would_freeze_is_refused():
    model, batch = make("classification", 0.0, "cpu"), batch_of("classification", 0, "cpu")
    objective = AdversarialObjective(model, MOVED)
    with pytest.warns(UserWarning, match="AdamW does not have capturable=True"):
        CapturedStep(objective, batch, torch.optim.AdamW(model.parameters()), graphs=RecordedGraphs())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = CapturedStep(objective, batch, optimizer, graphs=RecordedGraphs())
    step(batch)
    optimizer.param_groups[0]["lr"] = 0.2
    with pytest.raises(ValueError, match=r"^optimizer: its learning rate changed from \[0.1\] to \[0.2\]"):
        step(batch)


def trained(captured: bool, interrupt) -> list[torch.Tensor]:
    """Parameters after five steps, an interruption, and five steps."""
    model, batch = make("classification", 0.1, "cpu"), batch_of("classification", 0, "cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    objective = AdversarialObjective(model, MOVED)
    step = CapturedStep(objective, batch, optimizer, graphs=RecordedGraphs()) if captured else None
    torch.manual_seed(1)

    def run(steps: int) -> None:
        for _ in range(steps):
            if captured:
                step(batch)
            else:
                optimizer.zero_grad()
                objective.backward(batch)
                optimizer.step()

    run(5)
    interrupt(model, optimizer, objective, run)
    run(5)
    return [parameter.detach() for parameter in model.parameters()]


def load_a_checkpoint(model, optimizer, objective, run) -> None:
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), objective.state_dict()))
    run(5)
    for part, state in zip((model, optimizer, objective), kept, strict=True):
        part.load_state_dict(state)


def decay_the_weights(model, optimizer, objective, run) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.5


def freeze_a_layer(model, optimizer, objective, run) -> None:
    model.bert.encoder.layer[0].requires_grad_(False)
    for parameter in model.bert.encoder.layer[0].parameters():
        parameter.grad = None


@pytest.mark.parametrize("interrupt", [load_a_checkpoint, decay_the_weights, freeze_a_layer])
def test_what_a_graph_holds_may_change(interrupt):
    for mine, theirs in zip(trained(True, interrupt), trained(False, interrupt), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_a_number_of_items_is_no_shape():
    model, graphs = make("masked_lm", 0.0, "cpu"), RecordedGraphs()
    objective = AdversarialObjective(model, MOVED.replace(labelled_capacity=0.6))
    batch = batch_of("masked_lm", 0, "cpu")
    step = CapturedStep(objective, batch, graphs=graphs)
    losses = [float(step({**batch, "num_items_in_batch": items})["task_loss"]) for items in (4, 8, 16, 4, 8, 16)]
    assert (graphs.recorded, graphs.replayed) == (1, 3)
    assert losses == pytest.approx([losses[0], losses[0] / 2, losses[0] / 4] * 2, rel=1e-6)


def test_a_batch_that_cannot_be_told_apart_is_refused():
    model, batch = make("classification", 0.0, "cpu"), batch_of("classification", 0, "cpu")
    objective = AdversarialObjective(model, MOVED)
    with pytest.raises(ValueError, match=r"^batch: expected tensors or hashable values, got a list for 'text'"):
        CapturedStep(objective, {**batch, "text": ["a"]}, graphs=RecordedGraphs())
