"""The demo's table and its HTML page, both made from the runs alone."""

import html
from collections.abc import Sequence
from pathlib import Path

import torch

from alum_kernels.evaluation import LossIncreaseComparison, compare_reports
from examples import robustness_plots
from examples.robustness_plots import encoded
from examples.training import Run

COLUMNS = (
    "task",
    "method",
    "loss",
    "accuracy",
    "under attack",
    "loss increase",
    "largest KL",
    "ascent gain",
    "ms/step",
    "overhead",
)

NOTES = (
    "loss, accuracy: on held-out text, over labelled tokens for masked LM.",
    "under attack: accuracy when every input embedding is moved by a few projected gradient steps on the task's loss, "
    "each element by at most the radius named above.",
    "loss increase, largest KL: what a search of the same ball around the first held-out batch finds: the largest "
    "increase of a sample's loss (median over the samples that every method of the task gets right, over all where "
    "there is none), and the largest symmetric KL between its predictions there and at the clean point (mean over the "
    "samples).",
    "ascent gain: the divergence at the climbed perturbation over the divergence at the noise it started from, on "
    "average; 1 is no better than noise, and below 1 the projection took away more than the ascent gave.",
    "ms/step, overhead: median step with the optimizer, and its ratio to standard training of the same task; the "
    "methods ran one after another, so a busy machine shifts them; python -m benchmarks.step interleaves.",
    "One seed and few steps: the differences in accuracy between methods are within chance.",
)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def comparisons(runs: Sequence[Run]) -> list[tuple[str, LossIncreaseComparison, bool]]:
    """Of each task, the loss increases of its methods, and whether only samples that all get right are compared.

    Where the methods share no such sample (a sample of a language model has many tokens) all samples are compared.
    """
    found = []
    for task in dict.fromkeys(run.task for run in runs):
        reports = {run.method: run.loss_increase for run in runs if run.task == task and run.loss_increase is not None}
        if reports:
            right = bool(torch.stack([report.correct for report in reports.values()]).all(0).any())
            found.append((task, compare_reports(reports, only_correct=right), right))
    return found


def table(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """A row of cells a run, in the order of :data:`COLUMNS`."""
    standard = {run.task: run.seconds_per_step for run in runs if run.method == "standard" and run.seconds}
    increases = {task: found for task, found, _ in comparisons(runs)}
    rows = []
    for run in runs:
        compared = increases.get(run.task)
        median = compared.quartiles(run.method).median if compared and run.method in compared.reports else None
        seconds = run.seconds_per_step if run.seconds else None
        overhead = seconds / standard[run.task] if seconds and run.task in standard else None
        rows.append(
            (
                run.task,
                run.method,
                _number(run.figures.get("loss"), ".3f"),
                _number(run.figures.get("accuracy"), ".1%"),
                _number(run.figures.get("attacked_accuracy"), ".1%"),
                _number(median, ".3f"),
                _number(run.smoothness and run.smoothness.ascended_mean, ".3g"),
                _number(run.mean_telemetry("ascent_gain"), ".3g"),
                _number(None if seconds is None else 1e3 * seconds, ".0f"),
                _number(overhead, ".2f") + ("x" if overhead else ""),
            )
        )
    return rows


def table_lines(runs: Sequence[Run]) -> list[str]:
    """The table as aligned text."""
    rows = [COLUMNS, *table(runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def write_html(runs: Sequence[Run], facts: dict[str, str], path: Path) -> None:
    """One self-contained page: what ran where, the table, and plots of the curves."""
    cells = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table(runs)
    )
    head = "".join(f"<th>{html.escape(column)}</th>" for column in COLUMNS)
    conditions = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in NOTES)
    plots = "".join(
        f'<img alt="{html.escape(title)}" src="data:image/png;base64,{image}">' for title, image in _plots(runs)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>alum_kernels: adversarial training, measured</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse }} th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #ccc;
  text-align: right }}
th:nth-child(-n+2), td:nth-child(-n+2) {{ text-align: left }}
dl {{ display: grid; grid-template-columns: max-content auto; gap: 0 1rem }} dt {{ color: #777 }} dd {{ margin: 0 }}
img {{ max-width: 100%; margin: 1rem 0 }}
</style>
<h1>Adversarial training, measured</h1>
<dl>{conditions}</dl>
<table><thead><tr>{head}</tr></thead><tbody>
{cells}
</tbody></table>
<ul>{notes}</ul>
{plots}
</html>
""",
        encoding="utf-8",
    )


def _plots(runs: Sequence[Run]) -> list[tuple[str, str]]:
    pyplot = robustness_plots.pyplot()
    tasks = list(dict.fromkeys(run.task for run in runs))
    plots = []

    figure, axes = pyplot.subplots(1, len(tasks), figsize=(6 * len(tasks), 3.6), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for run in (run for run in runs if run.task == task):
            axis.plot(run.steps, run.losses, label=run.method)
        axis.set(title=f"{task}: task loss while training", xlabel="step", ylabel="loss")
        axis.legend()
    plots.append(("training loss by step", encoded(figure)))

    climbed = [(run, [(t["step"], t["ascent_gain"]) for t in run.telemetry if "ascent_gain" in t]) for run in runs]
    climbed = [(run, points) for run, points in climbed if points]
    if climbed:
        figure, axis = pyplot.subplots(figsize=(8, 3.6))
        for run, points in climbed:
            axis.plot(*zip(*points, strict=True), marker="o", label=f"{run.task}, {run.method}")
        axis.axhline(1.0, color="#999", linewidth=1)
        axis.set(title="Ascent gain: divergence after over before the ascent", xlabel="step", yscale="log")
        axis.legend()
        plots.append(("ascent gain by step", encoded(figure)))

    timed = [run for run in runs if run.seconds]
    figure, axis = pyplot.subplots(figsize=(8, 0.6 + 0.5 * len(timed)))
    names = [f"{run.task}, {run.method}" for run in timed]
    axis.barh(names, [1e3 * run.seconds_per_step for run in timed])
    axis.invert_yaxis()
    axis.set(title="Median milliseconds a step", xlabel="ms")
    plots.append(("milliseconds a step", encoded(figure)))

    judged = [run for run in runs if "attacked_accuracy" in run.figures]
    if judged:
        figure, axis = pyplot.subplots(figsize=(8, 0.8 + 0.7 * len(judged)))
        for offset, name, label in ((-0.2, "accuracy", "clean"), (0.2, "attacked_accuracy", "under attack")):
            places = [index + offset for index in range(len(judged))]
            axis.barh(places, [run.figures[name] for run in judged], height=0.38, label=label)
        axis.set_yticks(range(len(judged)), [f"{run.task}, {run.method}" for run in judged])
        axis.invert_yaxis()
        axis.set(title="Accuracy on held-out text", xlim=(0, 1))
        axis.legend()
        plots.append(("accuracy, clean and under attack", encoded(figure)))

    for task, compared, right in comparisons(runs):
        which = "samples that all get right" if right else "all samples"
        plots.append(robustness_plots.loss_increase(compared, f"{task}: largest increase of the loss, {which}"))
    for task in tasks:
        smooth = {run.method: run.smoothness for run in runs if run.task == task and run.smoothness is not None}
        if smooth:
            plots.append(robustness_plots.smoothness(smooth, f"{task}: local smoothness"))
    return plots
