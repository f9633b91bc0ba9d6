"""What the quality benchmark makes of its runs: steps at equal time, spreads over seeds, and what helped.

A run is one method, seed and number of steps. It counts at equal steps if it has that number, and at equal time if it
has the number that its method can afford; for the costliest method, one run is both.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alum_kernels.evaluation.quartiles import Quartiles
from alum_kernels.training import atomic

STANDARD = "standard"
EQUAL_STEPS, EQUAL_TIME = "equal steps", "equal time"
MODES = (EQUAL_STEPS, EQUAL_TIME)
MAY_CHANGE = ("tasks", "seeds")
"""Settings that a resumed measurement may extend; every run names its task and seed."""

Results = dict[str, Any]
"""The content of a result file; see :func:`new_results`."""


class ResumeError(ValueError):
    """A result file that cannot be continued; the message says why."""


class Job(NamedTuple):
    """One training to be run."""

    task: str
    seed: int
    method: str
    steps: int


def equal_time_steps(steps: int, seconds: Mapping[str, float]) -> dict[str, int]:
    """Steps that each method can take in the time that the costliest one needs for ``steps``.

    Args:
        steps: of the costliest method.
        seconds: a step of each method, by name.

    Raises:
        ValueError: no methods, or a time that is none.

    Example:
        >>> equal_time_steps(100, {"standard": 0.2, "alum": 0.5, "freelb": 0.6})
        {'standard': 300, 'alum': 120, 'freelb': 100}
    """
    if not seconds or not all(math.isfinite(value) and value > 0 for value in seconds.values()):
        raise ValueError(f"seconds: expected positive times of at least one method, got {dict(seconds)}")
    budget = steps * max(seconds.values())
    # a hair more than the budget, so that rounding takes no step away where the ratio is whole
    return {method: math.floor(budget / value * (1 + 1e-12)) for method, value in seconds.items()}


def new_results(machine: Mapping[str, Any], settings: Mapping[str, Any]) -> Results:
    """An empty result file.

    ``tasks`` holds, by task, the facts of its data, its ``steps``, the ``calibration`` (timings of a step, by method)
    and the ``equal_time_steps``; ``runs`` what was trained; ``resumed`` the machine's facts each time it was continued.
    """
    return {
        "benchmark": "quality",
        "machine": dict(machine),
        "resumed": [],
        "settings": dict(settings),
        "tasks": {},
        "runs": [],
        "summary": [],
        "verdict": [],
    }


def read_results(path: Path) -> Results:
    """Raises ResumeError for a file that is not one of this benchmark."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResumeError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ResumeError(f"{path}: expected JSON: {error}") from error
    if not isinstance(results, dict) or results.get("benchmark") != "quality":
        raise ResumeError(f"{path}: expected results of the quality benchmark")
    return results


def check_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises ResumeError where a measurement would go on under other conditions, naming them."""
    names = [name for name in {**old, **new} if name not in MAY_CHANGE and old.get(name) != new.get(name)]
    if names:
        changes = "; ".join(f"{name}: was {old.get(name)!r}, is {new.get(name)!r}" for name in names)
        raise ResumeError(f"--resume: expected the settings of the file, got {changes}")


def save(results: Results, path: Path) -> None:
    """Write the file with its summary; an interruption leaves the old one or the new one, never a part."""
    results["summary"], results["verdict"] = summary(results), verdict(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps(results, indent=1) + "\n")


def jobs(results: Results, task: str, seeds: Sequence[int]) -> list[Job]:
    """Trainings of a task that are still to be run: seed by seed, so that every seed is soon complete."""
    facts = results["tasks"][task]
    wanted = [
        Job(task, seed, method, steps)
        for seed in seeds
        for by_method in (dict.fromkeys(facts["equal_time_steps"], facts["steps"]), facts["equal_time_steps"])
        for method, steps in by_method.items()
    ]
    done = {job_of(run) for run in results["runs"]}
    return [job for job in dict.fromkeys(wanted) if job not in done]


def job_of(run: Mapping[str, Any]) -> Job:
    return Job(*(run[name] for name in Job._fields))


def runs_of(results: Results, task: str, mode: str, method: str) -> list[dict[str, Any]]:
    """Runs of a method that count in a mode, by seed."""
    facts = results["tasks"][task]
    steps = facts["steps"] if mode == EQUAL_STEPS else facts["equal_time_steps"][method]
    found = [run for run in results["runs"] if (run["task"], run["method"], run["steps"]) == (task, method, steps)]
    return sorted(found, key=lambda run: run["seed"])


def cost(results: Results, task: str, method: str) -> float | None:
    """Time of a method's step, as a multiple of a standard step; None if that was not measured."""
    calibration = results["tasks"][task]["calibration"]
    if STANDARD not in calibration:
        return None
    return calibration[method]["median_s"] / calibration[STANDARD]["median_s"]


def summary(results: Results) -> list[dict[str, Any]]:
    """One entry a task, mode and method that has runs.

    ``figures`` are the metrics of the task and the accuracies under attack, each with its values by seed and their
    :class:`Quartiles`; ``over_standard`` is the median, over the seeds that both have, of a seed's difference to
    standard
    training in the same mode.
    """
    entries = []
    for task in results["tasks"]:
        for mode in MODES:
            measured = STANDARD in results["tasks"][task]["equal_time_steps"]
            standard = runs_of(results, task, mode, STANDARD) if measured else []
            base = {run["seed"]: run["figures"] for run in standard}
            for method in results["tasks"][task]["equal_time_steps"]:
                runs = runs_of(results, task, mode, method)
                if runs:
                    entries.append(_entry(results, task, mode, method, runs, base))
    return entries


def _entry(
    results: Results,
    task: str,
    mode: str,
    method: str,
    runs: list[dict[str, Any]],
    base: Mapping[int, dict[str, float]],
) -> dict[str, Any]:
    figures = {}
    for name in runs[0]["figures"]:
        values = [run["figures"][name] for run in runs]
        differences = [run["figures"][name] - base[run["seed"]][name] for run in runs if run["seed"] in base]
        figures[name] = {
            "by_seed": values,
            **Quartiles.of(values).to_dict(),
            "over_standard": Quartiles.of(differences).median if differences else None,
        }
    return {
        "task": task,
        "mode": mode,
        "method": method,
        "seeds": [run["seed"] for run in runs],
        "steps": runs[0]["steps"],
        "of_standard": cost(results, task, method),
        "ms_per_step": 1e3 * results["tasks"][task]["calibration"][method]["median_s"],
        "train_seconds": Quartiles.of([run["train_seconds"] for run in runs]).median,
        "figures": figures,
    }


def main_metric(results: Results, task: str) -> str:
    return results["tasks"][task]["metrics"][0]


def attacks(results: Results, task: str) -> list[str]:
    """Figures of a task that are accuracies under attack."""
    return [name for name in results["tasks"][task]["figures"] if name.startswith("attacked_")]


def verdict(results: Results) -> list[str]:
    """A sentence a task, mode and figure: which methods are clearly better than standard training, if any.

    Clearly better is a lower quartile above standard's upper quartile, clearly worse the reverse.
    """
    sentences = []
    entries = summary(results)
    for task in results["tasks"]:
        for mode in MODES:
            own = {entry["method"]: entry for entry in entries if (entry["task"], entry["mode"]) == (task, mode)}
            if STANDARD not in own or len(own) < 2:
                continue
            for name in (main_metric(results, task), *attacks(results, task)):
                base = own[STANDARD]["figures"][name]
                others = {method: entry["figures"][name] for method, entry in own.items() if method != STANDARD}
                better = [method for method, figure in others.items() if figure["lower"] > base["upper"]]
                worse = [method for method, figure in others.items() if figure["upper"] < base["lower"]]
                seeds = min(len(entry["seeds"]) for entry in own.values())
                sentences.append(
                    f"{task}, {name}, {mode}, {seeds} seeds: "
                    + (f"better than standard: {', '.join(better)}" if better else "nothing is better than standard")
                    + (f"; worse: {', '.join(worse)}" if worse else "")
                    + "; the quartiles of the rest overlap with its"
                )
    return sentences
