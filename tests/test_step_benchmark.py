"""The whole-step benchmark on tiny shapes: every provider, the file it writes, and reasons where one cannot run."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from alum_kernels import AdversarialConfig, AdversarialObjective, symmetric_kl
from alum_kernels.adversarial.captured import WARM_STEPS

pytest.importorskip("transformers")

from benchmarks import machine, shapes, step, step_providers
from benchmarks.flops import forward_of_shape
from benchmarks.shapes import LLAMA_1B, ROBERTA_LARGE, SHAPES, Shape, labelled_rows
from benchmarks.step import measure_shape
from benchmarks.step_profile import profile_step
from benchmarks.step_providers import CAPTURED, PROVIDERS, Bench

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
TINY = {
    "classification": replace(SHAPES["minilm-cls-16x64"], pretrained=None, options=SMALL),
    "masked_lm": replace(SHAPES["minilm-mlm-16x64"], pretrained=None, options=SMALL),
    "causal_lm": replace(SHAPES["llama-1b-clm-4x1024"], options={**LLAMA_1B, **SMALL, "num_key_value_heads": 1}),
}
TINY = {task: replace(shape, name=f"tiny-{task}", batch=4, length=12, devices=("cpu",)) for task, shape in TINY.items()}

ROW = {
    "shape", "task", "model", "batch", "length", "provider", "mode", "timing", "of_standard", "flop_bound", "of_bound",
    "peak_bytes", "model_share", "kernel_share", "launches", "not_run",
}  # fmt: skip
TIMING = {"median_s", "p20_s", "p80_s", "repeats", "samples_s"}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Shape]:
    """A registry of the tiny shapes, and one that is meant for CUDA."""
    large = replace(SHAPES["roberta-large-cls-16x128"], options={**ROBERTA_LARGE, **SMALL})
    tiny = {shape.name: shape for shape in (*TINY.values(), large)}
    for module in (shapes, step):
        monkeypatch.setattr(module, "SHAPES", tiny)
    return tiny


# the file


def test_every_provider_takes_every_task_and_the_file_says_so(registry, tmp_path, capsys):
    path = tmp_path / "step.json"
    assert step.main(["--device", "cpu", "--rounds", "2", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert (written["benchmark"], written["rounds"]) == ("step", 2)
    assert written["machine"]["gpu"] is None
    assert written["machine"]["gpu_clocks"] is None
    rows = {(row["task"], row["provider"]): row for row in written["results"]}
    assert list(rows) == [(task, provider) for task in TINY for provider in PROVIDERS]
    printed = capsys.readouterr().out
    for (task, provider), row in rows.items():
        assert row.keys() == ROW
        assert (row["shape"], row["mode"], row["batch"], row["length"]) == (f"tiny-{task}", "eager", 4, 12)
        if row["not_run"] is not None:
            assert f"{provider:16}  not run: {row['not_run']}" in printed
            assert all(row[name] is None for name in ROW - {"not_run"} if name in ("timing", "of_standard", "of_bound"))
            continue
        assert row["timing"].keys() == TIMING
        assert len(row["timing"]["samples_s"]) == 2
        standard = rows[task, "standard"]["timing"]["median_s"]
        assert row["of_standard"] == pytest.approx(row["timing"]["median_s"] / standard)
        assert row["of_bound"] == pytest.approx(row["of_standard"] / row["flop_bound"])
        assert row["peak_bytes"] > 4 * 64 * 16  # the gradients of the embeddings at least
        assert row["model_share"] > 0.2
        assert row["model_share"] + row["kernel_share"] <= 1
        assert (row["kernel_share"] > 0) == provider.startswith("ours")
        assert row["launches"] is None


def test_who_cannot_take_which_step(registry, tmp_path):
    path = tmp_path / "step.json"
    step.main(["--device", "cpu", "--rounds", "1", "--shape", "tiny-classification", "--json", str(path)])
    reasons = {row["provider"]: row["not_run"] for row in json.loads(path.read_text())["results"]}
    assert reasons["standard"] is reasons["naive"] is reasons["ours"] is None
    for provider in ("naive, labelled", "ours, all", "ours, logits"):
        assert "nothing to choose among" in reasons[provider]
    assert "CUDA graphs need a GPU" in reasons[CAPTURED]


def test_a_shape_for_another_device_has_rows_that_say_so(registry):
    rows = measure_shape(registry["roberta-large-cls-16x128"], "eager", ["standard", "ours"], CPU, 1)
    assert [row["not_run"] for row in rows] == ["the shape is meant for cuda"] * 2


def test_what_was_measured_is_written_where_a_later_shape_fails(registry, tmp_path, monkeypatch):
    path = tmp_path / "step.json"
    original = step.measure_shape

    def failing(shape, *arguments):
        if shape.task == "masked_lm":
            raise RuntimeError("by intent")
        return original(shape, *arguments)

    monkeypatch.setattr(step, "measure_shape", failing)
    with pytest.raises(RuntimeError, match="by intent"):
        step.main(["--device", "cpu", "--rounds", "1", "--providers", "standard", "--json", str(path)])
    assert [row["task"] for row in json.loads(path.read_text())["results"]] == ["classification"]


# why a provider does not run


def test_a_missing_package(monkeypatch):
    monkeypatch.setattr(step_providers.importlib.util, "find_spec", lambda name: None)
    (row,) = measure_shape(TINY["classification"], "eager", ["smart-pytorch"], CPU, 1)
    assert row["not_run"] == "smart-pytorch is not installed"


def test_no_memory(monkeypatch):
    def greedy(bench: Bench) -> step_providers.Step:
        def call() -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        return step_providers.Step(bench.model, lambda: call)

    monkeypatch.setitem(PROVIDERS, "naive", greedy)
    standard, naive = measure_shape(TINY["classification"], "eager", ["standard", "naive"], CPU, 1)
    assert naive["not_run"] == "out of memory"
    assert standard["of_standard"] == 1.0


@dataclass
class Captured:
    """In the place of a captured step: gives up at the call ``fails_at``."""

    fails_at: int | None
    reason: str | None = None
    calls: int = 0

    def __call__(self, batch: dict) -> None:
        self.calls += 1
        if self.calls == self.fails_at:
            self.reason = "its capture failed: by intent"


@pytest.mark.parametrize("task", ["classification", "masked_lm"])
def test_a_capture_is_timed_once_it_stands(monkeypatch, task):
    made: list[Captured] = []

    def capture(objective: AdversarialObjective, batch: dict) -> Captured:
        assert (objective.config.labelled_capacity is None) == (task == "classification")
        made.append(Captured(fails_at))
        return made[-1]

    monkeypatch.setattr(AdversarialObjective, "capture", capture)
    fails_at = WARM_STEPS + 1  # where a graph is captured
    (row,) = measure_shape(TINY[task], "eager", [CAPTURED], CPU, 1)
    assert row["not_run"] == "its capture failed: by intent"
    assert made[0].calls == fails_at
    fails_at = None
    (row,) = measure_shape(TINY[task], "eager", [CAPTURED], CPU, 1)
    assert row["not_run"] is None
    assert row["timing"]["median_s"] > 0
    assert row["model_share"] is row["kernel_share"] is None
    assert made[1].calls > WARM_STEPS + 1


# figures


def test_without_a_standard_step_there_is_no_ratio():
    (row,) = measure_shape(TINY["classification"], "eager", ["ours"], CPU, 1)
    assert row["not_run"] is row["of_standard"] is row["of_bound"] is None
    assert row["timing"]["median_s"] > 0


def test_bounds_are_those_of_the_batch():
    shape = TINY["masked_lm"]
    batch, forward = shape.make_batch(CPU), forward_of_shape(shape)
    labelled = labelled_rows(shape, batch)
    rows = measure_shape(shape, "eager", ["standard", "naive", "ours", "ours, all"], CPU, 1)
    compared = int(batch["attention_mask"].sum())
    expected = [1.0, forward.bound(labelled), forward.bound(labelled), forward.bound(labelled, compared=compared)]
    assert [row["flop_bound"] for row in rows] == expected
    assert 0 < labelled < compared < 48


def test_shares_go_to_whose_ops_they_are():
    model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 8))
    x = torch.randn(256, 64, requires_grad=True)
    passes = profile_step(lambda: model(x).sum().backward(), model, CPU)
    assert passes.model_share > 0.5
    assert passes.library_share == 0
    assert passes.launches is None
    adv, clean = torch.randn(64, 4096, requires_grad=True), torch.randn(64, 4096)
    divergence = profile_step(lambda: symmetric_kl(adv, clean).backward(), model, CPU)
    assert divergence.library_share > 0.2
    # the gradient of the leaf alone is added up as a parameter's is
    assert divergence.model_share < 0.2
    assert "_compiled_call_impl" not in vars(model)


def test_a_twin_shares_parameters_and_nothing_else():
    shape = TINY["masked_lm"]
    model = shape.make_model(CPU)
    twin = shape.make_twin(model)
    pairs = zip(model.named_parameters(), twin.named_parameters(), strict=True)
    assert all(name == other and mine is its for (name, mine), (other, its) in pairs)
    AdversarialObjective(twin, AdversarialConfig.alum_finetuning())
    assert any(module._forward_hooks for module in twin.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight


def test_compiled_models_are_perturbed(monkeypatch):
    """Compiled code is shared by all models of a class: the standard step's would run the clean pass without hooks."""
    compile_model = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_model(self, backend="eager"))
    rows = measure_shape(TINY["classification"], "compiled", ["standard", "ours"], CPU, 1)
    assert [row["not_run"] for row in rows] == [None] * 2
    assert rows[1]["kernel_share"] > 0
    torch._dynamo.reset()


# arguments, and the machine


@pytest.mark.parametrize(
    ("arguments", "got", "known"),
    [
        (["--shape", "tiny-classification", "huge"], "huge", "tiny-masked_lm"),
        (["--providers", "standard", "hers"], "hers", "naive, labelled"),
        (["--rounds", "0"], "got 0", "number > 0"),
    ],
)
def test_unknown_names_are_answered_with_those_that_exist(registry, capsys, arguments, got, known):
    with pytest.raises(SystemExit):
        step.main(["--device", "cpu", *arguments])
    message = capsys.readouterr().err
    assert got in message
    assert known in message


def test_clocks_as_nvidia_smi_has_them(monkeypatch):
    class Properties:
        uuid = "7d2c"

    asked = []

    def answer(*command: str) -> str:
        asked.append(command)
        return "1980, 2619, 1980, 2619, [N/A]"

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    monkeypatch.setattr(machine, "_output", answer)
    clocks = {"sm_mhz": 1980, "memory_mhz": 2619, "max_sm_mhz": 1980, "max_memory_mhz": 2619, "power_limit_w": None}
    assert machine._gpu_clocks() == clocks
    assert "--id=GPU-7d2c" in asked[0]
    monkeypatch.setattr(machine, "_output", lambda *command: None)
    assert machine._gpu_clocks() == dict.fromkeys(clocks)
