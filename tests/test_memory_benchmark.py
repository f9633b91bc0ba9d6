"""The benchmark of peak memory: what it counts, and a small run of every method."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from test_estimators_benchmark import tiny_model

from alum_kernels.adversarial.config import PRESETS
from benchmarks import memory
from benchmarks.memory import Prepared, measured
from benchmarks.shapes import Shape, minilm

CPU = torch.device("cpu")
FORWARDS = {
    "standard": 1,
    "naive": 3,
    "alum_finetuning": 3,
    "r3f": 2,
    "freelb": 4,
    "freeat": 4,
    "yopo": 4,
    "neftune": 1,
    "alum, memory low": 4,
    "alum, fraction 0.25": 1 + 2 * 0.25,
    "alum, depth 3": 3,
    "smart, proximal": 4,  # the teacher has one
}


def test_gradients_count_where_the_step_makes_them():
    """A step that holds 3 bytes for 4 of its gradient until the gradient is there, by hand."""
    model = torch.nn.Linear(1000, 1000, bias=False)
    size = model.weight.nbytes

    def step(batch: dict[str, torch.Tensor]) -> None:
        held = torch.empty(750 * 1000)
        if model.weight.grad is None:
            model.weight.grad = torch.zeros_like(model.weight)
        else:
            model.weight.grad.zero_()
        model(batch["inputs"])
        del held

    found = measured(step, model, {"inputs": torch.zeros(4, 1000)}, CPU)
    outputs = 4 * 4 * 1000
    assert found["peak_bytes"] == size + 3 * size // 4 + outputs
    assert found["activation_bytes"] == 3 * size // 4 + outputs
    assert found["forwards"] == 1
    assert model.weight.grad is None


@pytest.mark.parametrize("task", ["classification", "masked_lm"])
def test_a_run_of_every_method(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Shape, "make_model", lambda shape, device: tiny_model(shape.task).float())
    path = tmp_path / "found.json"
    arguments = ["--task", task, "--batch", "8", "--length", "16", "--device", "cpu", "--json", str(path)]
    assert memory.main(arguments) == 0
    written = json.loads(path.read_text())
    assert written["benchmark"] == "memory"
    rows = {row["method"]: row for row in written["results"]}
    assert set(rows) == {"standard", "naive", *PRESETS, *FORWARDS}
    for name, wanted in FORWARDS.items():
        assert rows[name]["forwards"] == wanted, name
    standard = rows["standard"]
    for row in rows.values():
        assert row["of_standard"] == row["peak_bytes"] / standard["peak_bytes"]
        assert row["activations_of_standard"] == row["activation_bytes"] / standard["activation_bytes"]
    assert "activations of memory='low':" in capsys.readouterr().out


def test_low_memory_holds_one_graph_and_alum_two():
    """Activations outweigh the parameters here: few words, many positions."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, **shape, num_labels=3)).train()
    batch = minilm("classification", 16, 64).make_batch(CPU)
    batch["input_ids"] %= 64
    peaks = {}
    for method in memory.methods():
        if method.name in ("standard", "alum_finetuning", "alum, memory low"):
            prepared = Prepared(method, "classification", model)
            peaks[method.name] = measured(prepared.step, model, batch, CPU)["activation_bytes"]
            prepared.remove()
    assert peaks["alum, memory low"] < memory.GOAL * peaks["standard"]
    assert 1.7 * peaks["standard"] < peaks["alum_finetuning"] < 2.3 * peaks["standard"]


def test_methods_are_named_once():
    names = [method.name for method in memory.methods()]
    assert len(set(names)) == len(names)
