"""The benchmark of passes taken alone: which samples and gradients each has, and what they add up to."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from test_estimators_benchmark import tiny_model

from benchmarks import pass_costs
from benchmarks.pass_costs import PARTS, passes
from benchmarks.shapes import Shape, minilm


def test_each_pass_has_its_samples_and_its_gradients():
    model, seen = tiny_model("classification").float(), []
    batch = minilm("classification", 8, 16).make_batch(torch.device("cpu"))
    embeddings = model.get_input_embeddings().weight
    model.register_forward_pre_hook(
        lambda module, args, given: seen.append(len(given["attention_mask"])), with_kwargs=True
    )
    calls = passes(model, batch, 2)
    assert set(calls) == set(PARTS)
    has_gradients = {}
    for name, call in calls.items():
        model.zero_grad()
        result = call()
        has_gradients[name] = (embeddings.grad is not None, model.classifier.weight.grad is not None)
    assert seen == [8, 6, 2, 2]
    assert has_gradients == {
        "standard": (True, True),
        "rest": (True, True),
        "part": (False, True),
        "ascent": (False, False),
    }
    assert result.shape == (2, 16, embeddings.shape[1])
    assert result.abs().sum() > 0
    assert embeddings.requires_grad


def test_the_floor_is_the_sum_of_the_passes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Shape, "make_model", lambda shape, device: tiny_model(shape.task).float())
    path = tmp_path / "found.json"
    assert pass_costs.main(["--rounds", "2", "--json", str(path)]) == 0
    (found,) = json.loads(path.read_text())["results"]
    medians = {name: timing["median_s"] for name, timing in found["timings"].items()}
    floor = medians["rest"] + 2 * medians["part"] + medians["ascent"]
    assert found["floor_s"] == pytest.approx(floor)
    assert found["floor_of_standard"] == pytest.approx(floor / medians["standard"])
    assert f"{found['floor_of_standard']:.2f}x a standard step; counted 1.42x" in capsys.readouterr().out


@pytest.mark.parametrize("fraction", ["0", "1", "0.01"])
def test_a_fraction_without_a_part_is_refused(fraction, capsys):
    with pytest.raises(SystemExit, match="2"):
        pass_costs.main(["--fraction", fraction])
    assert f"expected some but not all of 16 samples, got {float(fraction)}" in capsys.readouterr().err
