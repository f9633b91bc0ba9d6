"""The growth benchmark: each op along each of its axes, peaks that grow as the sizes do, and refusals of memory."""

import doctest
import json
import sys

import pytest
import torch

from benchmarks import growth
from benchmarks.growth import Growth

SMALL = (
    Growth("symmetric_kl", "N", (64, 128), {"V": 512}),
    Growth("symmetric_kl", "V", (512, 1024), {"N": 64}),
    Growth("linear_symmetric_kl", "H", (16, 32), {"N": 32, "V": 256}),
    Growth("noise and ascent", "S", (8, 16), {"B": 4, "H": 64}),
)


def run(monkeypatch: pytest.MonkeyPatch, tmp_path, *arguments: str) -> list[dict]:
    path = tmp_path / "found.json"
    monkeypatch.setattr(growth, "ON_CPU", SMALL)
    monkeypatch.setattr(sys, "argv", ["growth", "--device", "cpu", "--rounds", "1", "--json", str(path), *arguments])
    assert growth.main() == 0
    written = json.loads(path.read_text())
    assert written["benchmark"] == "growth"
    return written["results"]


def test_the_examples_of_docstrings():
    assert doctest.testmod(growth).failed == 0


def test_every_size_has_both_providers_and_bytes_that_double_with_it(monkeypatch, tmp_path, capsys):
    rows = run(monkeypatch, tmp_path)
    assert len(rows) == 2 * sum(len(one.sizes) for one in SMALL)
    for one in SMALL[:2]:
        for provider in ("eager", "ours"):
            small, large = (
                row for row in rows if (row["op"], row["axis"], row["provider"]) == (one.op, one.axis, provider)
            )
            assert large["bytes_moved"] == 2 * small["bytes_moved"]
            assert 1.8 < large["peak_bytes"] / small["peak_bytes"] < 2.2
            assert small["timing"]["median_s"] > 0
            assert large["not_run"] is None
    assert "symmetric_kl over V; N 64, fp32" in capsys.readouterr().out


def test_axes_are_chosen(monkeypatch, tmp_path):
    assert {row["axis"] for row in run(monkeypatch, tmp_path, "--axis", "S", "H")} == {"S", "H"}


def test_a_provider_without_memory_stays_in_the_results_with_the_reason(monkeypatch, tmp_path):
    def refuse(call, device):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes")

    monkeypatch.setattr(growth, "peak_memory", refuse)
    rows = run(monkeypatch, tmp_path, "--axis", "S")
    assert [row["not_run"] for row in rows] == ["out of memory"] * 4
    assert all(row["timing"] is None for row in rows)


def test_another_failure_is_none_of_memory(monkeypatch, tmp_path):
    def fail(call, device):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(growth, "peak_memory", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(monkeypatch, tmp_path, "--axis", "S")
    assert torch.is_grad_enabled()
