"""Quality against cost, from a result file of the quality benchmark alone."""

import os
from pathlib import Path
from typing import Any

from .checkout import imports_from_examples
from .quality_results import EQUAL_STEPS, MODES, STANDARD, Results, attacks, main_metric, summary

with imports_from_examples("quality"):
    from examples.glue_metrics import LABELS

FILLED = {mode: mode == EQUAL_STEPS for mode in MODES}
ASIDE = {mode: 0.99 if FILLED[mode] else 1.01 for mode in MODES}
"""Factors on the cost, so that the two modes of a method do not hide each other."""

PANEL = (5.2, 3.8)


def draw(results: Results, path: Path) -> Path:
    """A row of panels a task: its metric, and its accuracy under each attack, against the cost of a step.

    A filled marker is a method at equal steps, a hollow one at equal time; bars reach from quartile to quartile, small
    dots are the seeds. The dashed line is the median of standard training at equal steps, the dotted one at equal time.
    The same results give the same file.

    Raises:
        ValueError: there are no runs to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = summary(results)
    if not entries:
        raise ValueError("results: expected runs, there are none to draw")
    tasks = list(dict.fromkeys(entry["task"] for entry in entries))
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    colours = {method: f"C{number % 10}" for number, method in enumerate(methods)}
    columns = max(1 + len(attacks(results, task)) for task in tasks)
    size = (PANEL[0] * columns, PANEL[1] * len(tasks) + 0.6)
    with matplotlib.rc_context({"svg.hashsalt": "quality", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(len(tasks), columns, figsize=size, squeeze=False)
        for row, task in zip(axes, tasks, strict=True):
            names = [main_metric(results, task), *attacks(results, task)]
            for axis, name in zip(row, names, strict=False):
                own = [entry for entry in entries if entry["task"] == task]
                _panel(axis, own, name, colours)
                axis.set(title=f"{results['tasks'][task]['title']}: {axis_label(results, name)}")
            for axis in row[len(names) :]:
                axis.set_visible(False)
        figure.legend(*_legend(colours), loc="outside lower center", ncols=5, frameon=False, fontsize="small")
        figure.set_layout_engine("constrained")
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=120, metadata=metadata)
        pyplot.close(figure)
    if path.suffix == ".svg":  # matplotlib ends lines of paths with blanks
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text(os.linesep.join(line.rstrip() for line in lines) + os.linesep, encoding="utf-8", newline="")
    return path


def axis_label(results: Results, name: str) -> str:
    """What a figure is called on an axis."""
    if not name.startswith("attacked_"):
        return LABELS[name]
    norm = name.removeprefix("attacked_")
    return f"accuracy under attack, {norm} {results['settings']['attack'][norm]:g}"


def _panel(axis: Any, entries: list[dict[str, Any]], name: str, colours: dict[str, str]) -> None:
    for entry in entries:
        figure, colour, filled = entry["figures"][name], colours[entry["method"]], FILLED[entry["mode"]]
        cost = entry["ms_per_step"] if entry["of_standard"] is None else entry["of_standard"]
        place = cost * ASIDE[entry["mode"]]
        reach = [[figure["median"] - figure["lower"]], [figure["upper"] - figure["median"]]]
        face = colour if filled else "white"
        axis.errorbar(
            place, figure["median"], yerr=reach, color=colour, marker="o" if filled else "s", markerfacecolor=face,
            markersize=7, capsize=3, elinewidth=1, zorder=3,
        )  # fmt: skip
        axis.scatter([place] * len(figure["by_seed"]), figure["by_seed"], s=6, color=colour, alpha=0.5, zorder=2)
        if entry["method"] == STANDARD:
            axis.axhline(figure["median"], color=colour, linestyle="--" if filled else ":", linewidth=0.8, zorder=1)
    relative = all(entry["of_standard"] is not None for entry in entries)
    axis.set_xlabel("cost of a step (standard = 1)" if relative else "ms per step")
    axis.grid(alpha=0.3)


def _legend(colours: dict[str, str]) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, marker="o", linestyle="") for colour in colours.values()]
    handles += [
        Line2D([], [], color="#555", marker="o" if FILLED[mode] else "s", linestyle="",
               markerfacecolor="#555" if FILLED[mode] else "white")
        for mode in MODES
    ]  # fmt: skip
    return handles, [*colours, *MODES]
