"""What a step of every method costs, counted in passes, and what its input-only backwards leave alone."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from method_cases import LARGE, NORMS, descend, example, objective_of, preset, without_adversary
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from alum_kernels import AdversarialConfig
from alum_kernels.adversarial.config import PRESETS


@dataclass(frozen=True)
class Passes:
    """Forwards to the model's end and to its first layer's; backwards to the input alone and to the parameters."""

    forwards: int
    first_layer: int
    input_only: int
    full: int
    first_layer_backwards: int = 0


def passes(forwards: int, input_only: int, full: int, *, first_layer: int = 0) -> Passes:
    return Passes(forwards, first_layer, input_only, full, first_layer)


STANDARD = passes(1, 0, 1)
K = 3
TABLE = {
    "alum_pretraining": passes(3, 1, 1),
    "alum_continual": passes(3, 1, 1),
    "alum_finetuning": passes(3, 1, 1),
    "smart": passes(3, 1, 1),
    "mtdnn": passes(3, 1, 1),
    "vat": passes(3, 1, 1),
    "sift": passes(3, 1, 1),
    "r3f": passes(2, 0, 1),
    "rdrop": passes(2, 0, 1),
    "neftune": passes(1, 0, 1),
    "pgd": passes(K + 1, K, 1),
    "freelb": passes(K + 1, 0, K + 1),
    "freeat": passes(K + 1, 0, K + 1),
    "fgm": passes(2, 0, 2),
    "yopo": passes(K + 1, 0, K + 1, first_layer=3 * K),
    "llr": passes(2 + 2, 1 + 2, 1),
}
"""K = 1 of methods that climb the divergence; of the others FreeLB's K = 3 of RTE, and YOPO's n = 3; LLR's K = 2."""

AT_THE_END = [name for name in PRESETS if TABLE[name].full == 1]


def count(family: str, config: AdversarialConfig, monkeypatch: pytest.MonkeyPatch, **progress) -> Passes:
    """Passes of one step; no input-only backward may touch a parameter."""
    original, batch = example(family, "classification")
    model = copy.deepcopy(original)
    objective = objective_of(family, model, config)
    if config.proximal > 0:
        objective.follow(torch.optim.SGD(model.parameters(), lr=0.1))
    if progress:
        objective.set_progress(**progress)
    found = dict.fromkeys(("begun", "ended", "grads", "first_layer_grads", "full", "parameter_gradients"), 0)

    def add(name: str) -> None:
        found[name] += 1

    model.register_forward_pre_hook(lambda *_: add("begun"))
    model.register_forward_hook(lambda *_: add("ended"))
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: add("parameter_gradients"))
    grad = torch.autograd.grad

    def grad_alone(outputs, inputs, *args, **kwargs):
        parameters = {id(parameter) for parameter in model.parameters()}
        assert not any(id(tensor) in parameters for tensor in inputs)
        before = [parameter.grad for parameter in model.parameters()]
        copies = [None if own is None else own.clone() for own in before]
        gradients = found["parameter_gradients"]
        results = grad(outputs, inputs, *args, **kwargs)
        assert found["parameter_gradients"] == gradients
        for parameter, own, kept in zip(model.parameters(), before, copies, strict=True):
            assert parameter.grad is own
            assert own is None or torch.equal(own, kept)
        # a first layer's backward is the only one while its forward was left
        add("first_layer_grads" if found["begun"] - found["ended"] > found["first_layer_grads"] else "grads")
        return results

    def backward(loss: Tensor) -> None:
        add("full")
        before = found["parameter_gradients"]
        loss.backward()
        assert found["parameter_gradients"] > before

    monkeypatch.setattr(torch.autograd, "grad", grad_alone)
    options = {"update": descend(model, 0.1)} if config.backward == "replay" else {}
    objective.backward(batch, backward=backward, **options)
    monkeypatch.undo()
    return Passes(
        forwards=found["ended"],
        first_layer=found["begun"] - found["ended"],
        input_only=found["grads"],
        full=found["full"],
        first_layer_backwards=found["first_layer_grads"],
    )


def test_the_table_has_every_preset():
    assert set(TABLE) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("family", ["bag", "bert", "bart"])
def test_passes_of_a_preset(family, name, monkeypatch):
    if (name == "sift" and family not in NORMS) or (name == "llr" and family == "bag"):
        pytest.skip("no layer norm of its embeddings, or no loss of its own")
    assert count(family, preset(name), monkeypatch) == TABLE[name]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_passes_of_more_steps(steps, monkeypatch):
    for name in ("alum_finetuning", "smart", "mtdnn", "vat", "pgd"):
        assert count("bag", preset(name, steps=steps), monkeypatch) == passes(steps + 2 - (name == "pgd"), steps, 1)
    for name in ("freelb", "freeat"):
        assert count("bag", preset(name, steps=steps), monkeypatch) == passes(steps + 1, 0, steps + 1)
    for inner in (1, 2):
        config = preset("yopo", steps=steps, inner_steps=inner)
        assert count("bag", config, monkeypatch) == passes(steps + 1, 0, steps + 1, first_layer=steps * inner)


@pytest.mark.parametrize("name", AT_THE_END)
def test_a_teacher_is_one_more_forward(name, monkeypatch):
    config = preset(name, clean_weight=1.0)
    without = count("bert", config, monkeypatch)
    # of methods that train at the perturbed point alone, the clean pass is one as well
    assert without.forwards == TABLE[name].forwards + (name in ("pgd", "neftune"))
    assert count("bert", config.replace(proximal=1.0), monkeypatch) == replace(without, forwards=without.forwards + 1)


def test_a_teacher_alone_is_one_more_forward_than_the_standard_step(monkeypatch):
    config = AdversarialConfig(alpha=0.0, proximal=1.0)
    assert count("bert", config, monkeypatch) == passes(2, 0, 1)


@pytest.mark.parametrize("name", PRESETS)
def test_before_its_start_a_method_costs_a_standard_step(name, monkeypatch):
    assert count("bert", preset(name, start=7), monkeypatch) == STANDARD


@pytest.mark.parametrize("ascent", ["divergence", "task"])
@pytest.mark.parametrize("name", AT_THE_END)
def test_without_weights_a_method_costs_a_standard_step(name, ascent, monkeypatch):
    config = without_adversary(name, ascent)
    assert count("bert", config, monkeypatch) == STANDARD
    assert count("bert", config.replace(proximal=1.0), monkeypatch) == passes(2, 0, 1)


def test_a_schedule_at_zero_runs_nothing(monkeypatch):
    for proximal, cost in ((0.0, STANDARD), (1.0, passes(2, 0, 1))):
        config = preset("smart", alpha_schedule=((0.5, 0.0), (1.0, 1.0)), proximal=proximal, signal_check_interval=1)
        assert count("bert", config, monkeypatch, step=0, total=4) == cost
        whole = passes(3 + 1 + int(proximal), 1, 1)  # the signal check is one more forward
        assert count("bert", config, monkeypatch, step=3, total=4) == whole


def test_an_input_only_backward_multiplies_as_much_as_a_forward(monkeypatch):
    """Gradients of weights would double it."""
    original, batch = example("bag", "classification")
    model = copy.deepcopy(original)
    objective, grad, counts = objective_of("bag", model, preset("alum_finetuning", **LARGE)), torch.autograd.grad, []

    def counted(*args, **kwargs):
        with FlopCounterMode(display=False) as counter:
            results = grad(*args, **kwargs)
        counts.append(counter.get_total_flops())
        return results

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch["input_ids"], batch["attention_mask"])
    forward = counter.get_total_flops()
    monkeypatch.setattr(torch.autograd, "grad", counted)
    output = objective(**batch)
    monkeypatch.undo()
    assert counts == [forward] and forward > 0  # noqa: PT018
    with FlopCounterMode(display=False) as counter:
        output.loss.backward()
    # two branches, each with gradients of inputs and weights; the embeddings' lookup multiplies nothing
    assert counter.get_total_flops() == 4 * forward
