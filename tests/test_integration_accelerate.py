"""``AcceleratedObjective``: accumulation, clipping, places over processes, schedules and checkpoints."""

import pytest
import tiny_models
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from tiny_loops import APART, FAR, FROM_FP32, assert_alike, assert_same, plain_gradients, rows_of, watched
from tiny_trainer import MOVED, ON_THE_WAY
from torch import nn

from alum_kernels import AdversarialConfig, AdversarialObjective, NoisePlace
from alum_kernels.evaluation import largest_loss_increase
from alum_kernels.integrations.accelerate import AcceleratedObjective

BATCHES = [tiny_models.classification_batch(8, seed=seed) for seed in range(3)]
TAUGHT = MOVED.replace(proximal=2.0, proximal_momentum=0.5)
LATER = ON_THE_WAY.replace(std=0.0, start=0.5)  # without noise: a plain loop draws no seed before the start


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """An iteration that an exception ended earlier would be the present one: Accelerate keeps its state by process."""
    GradientState._reset_state()
    AcceleratorState._reset_state(True)


def accelerated(model: nn.Module, config: AdversarialConfig, accumulation: int, precision: str = "no"):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, mixed_precision=precision)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    objective = AcceleratedObjective(model, config, accelerator=accelerator, total_steps=len(BATCHES))
    if config.proximal > 0:
        objective.follow(optimizer)
    return accelerator, model, optimizer, objective


def trained(model, config, size, max_norm=None, *, by_loss=False, precision="no"):
    """Gradients at each optimizer step of a loop as Accelerate's users write it."""
    accelerator, model, optimizer, objective = accelerated(model, config, 8 // size, precision)
    gradients = []
    for batch in BATCHES:
        for part in rows_of(batch, size):
            with accelerator.accumulate(model):
                if by_loss:
                    accelerator.backward(objective(**part).loss)
                else:
                    objective.backward(part)
                if accelerator.sync_gradients:
                    if max_norm is not None:
                        accelerator.clip_grad_norm_(model.parameters(), max_norm)
                    gradients.append(tiny_models.Gradients.of(model).flat())
                optimizer.step()
                optimizer.zero_grad()
    assert objective.optimizer_steps == len(BATCHES)
    return gradients


@pytest.mark.parametrize("size", [8, 2])
@pytest.mark.parametrize("config", [MOVED, ON_THE_WAY, MOVED.replace(memory="low"), TAUGHT, LATER])
def test_micro_batches_leave_the_gradients_of_the_plain_loop(config, size):
    expected = plain_gradients(tiny_models.bert().double(), BATCHES, config)
    assert_same(trained(tiny_models.bert().double(), config, size), expected)


def test_the_loss_itself_goes_through_the_accelerators_backward():
    expected = plain_gradients(tiny_models.bert().double(), BATCHES, MOVED)
    assert_same(trained(tiny_models.bert().double(), MOVED, 2, by_loss=True), expected)


def test_clipping_leaves_what_the_plain_loop_leaves():
    expected = plain_gradients(tiny_models.bert().double(), BATCHES, MOVED, max_norm=0.3)
    assert all(gradient.norm() == pytest.approx(0.3, rel=1e-4) for gradient in expected)
    assert_same(trained(tiny_models.bert().double(), MOVED, 2, max_norm=0.3), expected)


@pytest.mark.parametrize("config", [FAR, ON_THE_WAY, FAR.replace(memory="low")], ids=["alum", "freelb", "low"])
def test_bf16_trains_as_a_plain_loop_under_autocast(config):
    model = tiny_models.bert()
    seen = watched(model.bert.encoder.layer[0].attention.self.query)
    found = trained(model, config, 2, max_norm=0.1, precision="bf16")
    assert set(seen) == {torch.bfloat16}
    expected = plain_gradients(tiny_models.bert(), BATCHES, config, max_norm=0.1, autocast=torch.bfloat16)
    assert_alike(found[:1], expected[:1], APART[torch.bfloat16])
    assert_alike(found, expected, FROM_FP32[torch.bfloat16])  # steps from slightly different parameters
    exact = plain_gradients(tiny_models.bert(), BATCHES[:1], config, max_norm=0.1)
    assert_alike(found[:1], exact, FROM_FP32[torch.bfloat16])


def test_fp16_of_an_accelerator_is_fp32_on_a_cpu():
    """Accelerate neither casts nor scales there, and says nothing."""
    model = tiny_models.bert()
    seen = watched(model.bert.encoder.layer[0].attention.self.query)
    found = trained(model, MOVED, 8, precision="fp16")
    assert set(seen) == {torch.float32}
    assert_alike(found, plain_gradients(tiny_models.bert(), BATCHES, MOVED), APART[None])


def test_a_scale_weighs_micro_batches_by_their_labels():
    batch = tiny_models.masked_lm_batch(8)
    expected = plain_gradients(tiny_models.bert_masked_lm().double(), [batch], MOVED)
    accelerator, model, _, objective = accelerated(tiny_models.bert_masked_lm().double(), MOVED, 4)

    def labelled(part) -> int:
        return (part["labels"] != -100).sum().item()

    for part in rows_of(batch, 2):
        with accelerator.accumulate(model):
            objective.backward(part, scale=labelled(part) / (labelled(batch) / 4))
    assert_same([tiny_models.Gradients.of(model).flat()], expected)


def test_processes_of_a_step_share_a_seed_and_differ_in_place():
    class Counter:
        seeds = 0

        def draw_seed(self):
            self.seeds += 1
            return torch.tensor([self.seeds])

    places = [NoisePlace(Counter(), process, 3) for process in range(3)]
    found = [[place.next(2) for _ in range(2)] for place in places]
    assert [[offset for _, offset in batches] for batches in found] == [[0, 6], [2, 8], [4, 10]]
    assert {seed.item() for batches in found for seed, _ in batches} == {1}
    places[0].begin()
    seed, offset = places[0].next(2)
    assert (seed.item(), offset) == (2, 0)
    with pytest.raises(ValueError, match=r"^process: expected less than processes 2, got 2"):
        NoisePlace(Counter(), 2, 2)


def test_a_checkpoint_of_the_accelerator_goes_on_with_the_noise(tmp_path):
    def steps(model, accelerator, optimizer, objective, batches):
        for batch in batches:
            objective.backward(batch)
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach().clone() for parameter in model.parameters()]

    accelerator, model, optimizer, objective = accelerated(tiny_models.bert().double(), TAUGHT, 1)
    accelerator.register_for_checkpointing(objective)
    steps(model, accelerator, optimizer, objective, BATCHES[:2])
    accelerator.save_state(tmp_path / "state")
    expected = steps(model, accelerator, optimizer, objective, BATCHES[2:])

    accelerator, model, optimizer, objective = accelerated(tiny_models.bert(seed=1).double(), TAUGHT, 1)
    accelerator.register_for_checkpointing(objective)
    accelerator.load_state(tmp_path / "state")
    assert objective.optimizer_steps == 2
    for own, theirs in zip(steps(model, accelerator, optimizer, objective, BATCHES[2:]), expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-12)


def test_what_is_not_supported_is_refused(monkeypatch):
    model = tiny_models.bert()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    with pytest.raises(TypeError, match=r"^accelerator: expected an accelerate.Accelerator, got str"):
        AcceleratedObjective(model, MOVED, accelerator="cpu")
    with pytest.raises(ValueError, match=r"^accelerator: expected gradient_accumulation_steps 1 for freeat"):
        AcceleratedObjective(model, AdversarialConfig.freeat(), accelerator=accelerator)
    with pytest.raises(ValueError, match=r"^capture: expected an AdversarialObjective in a loop without Accelerate"):
        AcceleratedObjective(model, MOVED, accelerator=accelerator).capture({})
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.FSDP))
    with pytest.raises(ValueError, match=r"^accelerator: expected a single process or Distributed.*, got FSDP"):
        AcceleratedObjective(model, MOVED, accelerator=accelerator)


def test_data_parallel_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"^model: expected a module or Dist.* got DataParallel, whose replicas"):
        AdversarialObjective(nn.DataParallel(tiny_models.bert()), MOVED)
    with pytest.raises(ValueError, match=r"^model: expected a module or Dist.* got DataParallel, whose replicas"):
        largest_loss_increase(nn.DataParallel(tiny_models.bert()), BATCHES[:1], epsilon=1e-2)
