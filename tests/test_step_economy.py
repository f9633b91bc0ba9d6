"""What an exact step does not do: look embeddings up again, wait for the device, pay for telemetry that is off."""

import pytest
import tiny_models
import torch
from method_cases import MOVED
from torch.utils._python_dispatch import TorchDispatchMode

from alum_kernels import AdversarialConfig, AdversarialObjective, projected_ascent
from alum_kernels.adversarial import perturbation
from alum_kernels.adversarial.telemetry import Telemetry

WAITS = ("_local_scalar_dense", "nonzero.default", "is_nonzero", "masked_select", "unique")


class Operations(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return sum(name in found for found in self.names)


def operations(model, config: AdversarialConfig, batch: dict) -> Operations:
    """Of the second step: the first one verifies the head and makes constants."""
    objective = AdversarialObjective(model, config)
    objective.backward(batch)
    with Operations() as seen:
        objective.backward(batch)
    return seen


@pytest.mark.parametrize("changes", [{}, {"dropout": "off"}, {"adversarial_fraction": 0.5}], ids=str)
@pytest.mark.parametrize("task", ["classification", "masked_lm"])
def test_the_word_embeddings_are_looked_up_and_differentiated_once(task, changes):
    model = tiny_models.bert_masked_lm() if task == "masked_lm" else tiny_models.bert()
    batch = tiny_models.masked_lm_batch() if task == "masked_lm" else tiny_models.classification_batch()
    vocabulary = model.get_input_embeddings().weight
    lookups = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.embedding.default and args[0].data_ptr() == vocabulary.data_ptr():
                lookups.append("forward")
            if func is torch.ops.aten.embedding_dense_backward.default and args[2] == vocabulary.shape[0]:
                lookups.append("backward")
            return func(*args, **(kwargs or {}))

    objective = AdversarialObjective(model, MOVED.replace(**changes))
    objective.backward(batch)  # the first one tries the head on a sample
    with Watch():
        objective.backward(batch)
    assert lookups == ["forward", "backward"]


@pytest.mark.parametrize(
    "changes",
    [
        {"labelled_capacity": 0.6},
        {"labelled_capacity": 0.6, "positions": "all", "steps": 2},
        {"labelled_capacity": 0.6, "memory": "low"},
        {"labelled_capacity": 0.6, "adversarial_fraction": 0.5},
        {"labelled_capacity": 0.6, "ascent_depth": 1, "signal_check_interval": 1},
    ],
    ids=str,
)
def test_with_room_for_the_labels_nothing_is_read_from_the_device(changes, monkeypatch):
    # so that the model's own look at its mask, which no step of this library causes, is not counted
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    seen = operations(tiny_models.bert_masked_lm(0.1), MOVED.replace(**changes), tiny_models.masked_lm_batch())
    assert [name for name in seen.names if any(wait in name for wait in WAITS)] == []
    without = operations(tiny_models.bert_masked_lm(0.1), MOVED, tiny_models.masked_lm_batch())
    assert without.count("nonzero.default") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("task", ["classification", "masked_lm"])
def test_a_step_on_a_gpu_does_not_wait(task):
    model = (tiny_models.bert_masked_lm(0.1) if task == "masked_lm" else tiny_models.bert(0.1)).cuda()
    batch = tiny_models.masked_lm_batch() if task == "masked_lm" else tiny_models.classification_batch()
    batch = {name: value.cuda() for name, value in batch.items()}
    del batch["attention_mask"]  # transformers reads it
    objective = AdversarialObjective(model, MOVED.replace(labelled_capacity=0.6))
    objective.backward(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective.backward(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_too_many_labels_for_the_room_give_no_number():
    model, batch = tiny_models.bert_masked_lm(), tiny_models.masked_lm_batch()
    share = float((batch["labels"] != -100).float().mean())
    enough, few = (AdversarialObjective(model, MOVED.replace(labelled_capacity=room)) for room in (share, share / 2))
    plain = AdversarialObjective(model, MOVED)
    seed = torch.tensor([5])
    torch.testing.assert_close(
        enough.forward(batch, seed=seed).loss, plain.forward(batch, seed=seed).loss, rtol=1e-6, atol=0
    )
    assert few.forward(batch, seed=seed).loss.isnan()


def test_telemetry_that_is_off_costs_nothing(monkeypatch):
    asked = []

    def ascent(*args, return_stats=False, **kwargs):
        asked.append(return_stats)
        return projected_ascent(*args, return_stats=return_stats, **kwargs)

    monkeypatch.setattr(perturbation, "projected_ascent", ascent)
    monkeypatch.setattr(Telemetry, "add", lambda *_, **values: pytest.fail(f"added {', '.join(values)}"))
    seen = operations(tiny_models.bert(), MOVED.replace(telemetry=False), tiny_models.classification_batch())
    assert asked == [False, False]
    own = [name.split(".")[1] for name in seen.names if name.startswith("alum_kernels.")]
    assert own == [
        "noise_init", "symmetric_kl_loss_and_gradient", "projected_ascent",
        "symmetric_kl_loss", "symmetric_kl_gradient",
    ]  # fmt: skip


def test_the_ascent_runs_no_backward_of_a_parameter():
    """Products of linear layers: 3 forwards, one backward to inputs alone, 2 to inputs and weights."""
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    with Operations() as standard:
        model.zero_grad()
        model(**batch).loss.backward()
    products = standard.count("aten.mm") + standard.count("aten.addmm")
    seen = operations(model, MOVED, batch)
    ours = seen.count("aten.mm") + seen.count("aten.addmm")
    linears = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert products == 3 * linears
    assert ours == 3 * linears + linears + 2 * 2 * linears
