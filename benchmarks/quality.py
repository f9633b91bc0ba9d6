"""Does adversarial training help? Quality of fine-tuned models, at equal steps and at equal time, against the cost.

    python -m benchmarks.quality --data FOLDER                     SST-2 on a CPU: seven methods, three seeds, two modes
    python -m benchmarks.quality --data FOLDER --full              every task, five seeds: for a GPU
    python -m benchmarks.quality --data FOLDER --resume            goes on where it was interrupted
    python -m benchmarks.quality --plot benchmarks/results/FILE.json

Every method starts from the same model and sees the same batches in the same order, seed by seed (examples/glue.py).
Equal steps: the same number for all. Equal time: first a step of every method is timed, interleaved on the same
batches; then each method gets the steps that the costliest one's time (at equal steps) affords, so that from there on
nothing depends on the clock. Judged by the task's metric on development examples, by accuracy under a small attack on
the embeddings, and by the time of a step as a multiple of a standard one. The file is written after every run; a plot
lies beside it.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from alum_kernels.corpora import CorpusError
from alum_kernels.evaluation.quartiles import Quartiles
from alum_kernels.training.errors import TrainingError
from alum_kernels.training.models import bundled_model

from .checkout import imports_from_examples
from .machine import describe, facts, result_path
from .quality_plot import draw
from .quality_results import (
    MODES,
    Job,
    Results,
    ResumeError,
    attacks,
    check_settings,
    jobs,
    main_metric,
    new_results,
    read_results,
    save,
)
from .quality_task import TaskBench
from .table import Table, ratio

with imports_from_examples("quality"):
    from examples.fine_tuning import Start
    from examples.glue_tasks import TASKS
    from examples.methods import chosen_methods

METHODS = "standard,r3f,alum_finetuning,alum_linf,alum_sign,smart_proximal,freelb"
SMALL = {"tasks": "sst2", "seeds": 3, "steps": 40, "epochs": None, "length": 40, "attack_examples": 96, "rounds": 7}
FULL = {
    "tasks": ",".join(TASKS), "seeds": 5, "steps": 1000, "epochs": 3.0, "length": 128, "attack_examples": 512,
    "rounds": 15,
}  # fmt: skip
INTERRUPTED = 130
LEARNING_RATE = 2e-4


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__spec__.name}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def default(name: str) -> str:
        return f"(default: {SMALL[name]}; --full: {FULL[name]})"

    parser.add_argument("--data", help="folder of the tasks' files, or hub; see examples/glue.py")
    parser.add_argument("--full", action="store_true", help="all tasks, more seeds and longer runs")
    parser.add_argument("--task", dest="tasks", help=f"comma-separated, of {', '.join(TASKS)} {default('tasks')}")
    parser.add_argument("--method", default=METHODS, help="comma-separated, as in examples/glue.py (%(default)s)")
    parser.add_argument("--seeds", type=int, help=f"number of seeds, from 0 {default('seeds')}")
    parser.add_argument("--steps", type=int, help=f"of a run at equal steps, at most {default('steps')}")
    parser.add_argument(
        "--epochs", type=float, help=f"the same in passes over the training examples {default('epochs')}"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--length", type=int, help=f"tokens a sequence at most {default('length')}")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="default: %(default)s")
    parser.add_argument("--train-examples", type=int, help="a random part of the training examples (all)")
    parser.add_argument("--dev-examples", type=int, help="a random part of the development examples (all)")
    parser.add_argument(
        "--attack-examples", type=int, help=f"attacked at most, 0 for none {default('attack_examples')}"
    )
    parser.add_argument("--attack-linf", type=float, default=2e-3, help="radius of each element (default: %(default)s)")
    parser.add_argument("--attack-l2", type=float, default=2e-2, help="radius of each token (default: %(default)s)")
    parser.add_argument("--attack-steps", type=int, default=3, help="gradient steps (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help=f"timed steps of each method {default('rounds')}")
    parser.add_argument("--model", help="name or path of a pretrained model (default: the bundled MiniLM, offline)")
    parser.add_argument("--threads", type=int, help="CPU threads (all that PyTorch takes)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results"), help="file or folder (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="continue the file that is there")
    parser.add_argument("--overwrite", action="store_true", help="replace the file that is there")
    parser.add_argument("--plot", type=Path, help="only draw the plot of this result file")
    chosen = parser.parse_args(given)
    if chosen.plot is None and chosen.data is None:
        parser.error("--data: expected a folder or hub")
    if chosen.resume and chosen.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    for name, value in (FULL if chosen.full else SMALL).items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
    chosen.tasks = [name.strip() for name in chosen.tasks.split(",") if name.strip()]
    unknown = [name for name in chosen.tasks if name not in TASKS]
    if unknown or not chosen.tasks:
        parser.error(f"--task: expected names of {', '.join(TASKS)}, got {', '.join(unknown) or 'none'}")
    try:
        chosen.method = chosen_methods(chosen.method)
    except ValueError as error:
        parser.error(f"--method: {error}")
    for name in ("seeds", "steps", "batch_size", "rounds", "train_examples", "dev_examples", "threads"):
        value = getattr(chosen, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    for name in ("attack_examples", "attack_steps", "attack_linf", "attack_l2"):
        if getattr(chosen, name) < 0:
            parser.error(f"--{name.replace('_', '-')}: expected at least 0, got {getattr(chosen, name)}")
    for name in ("learning_rate", "epochs"):
        value = getattr(chosen, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')}: expected more than 0, got {value}")
    if chosen.length < 8:
        parser.error(f"--length: expected at least 8, got {chosen.length}")
    return chosen


def settings_of(chosen: argparse.Namespace) -> dict[str, Any]:
    """What decides the results, besides data and machine."""
    names = (
        "tasks", "seeds", "method", "steps", "epochs", "batch_size", "length", "learning_rate", "train_examples",
        "dev_examples", "rounds", "device", "model",
    )  # fmt: skip
    attack = {
        "linf": chosen.attack_linf,
        "l2": chosen.attack_l2,
        "steps": chosen.attack_steps,
        "examples": chosen.attack_examples,
    }
    return {**{name: getattr(chosen, name) for name in names}, "threads": torch.get_num_threads(), "attack": attack}


def seconds_left(results: Results, pending: list[Job]) -> float:
    """Estimate, from the calibration."""

    def seconds(job: Job) -> float:
        known = results["tasks"][job.task]
        return job.steps * known["calibration"][job.method]["median_s"] + known["judging_s"]

    return sum(map(seconds, pending))


def check_task(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> None:
    """Raises ResumeError where a task's data or methods are not those of the file."""
    changed = [key for key in new if old.get(key) != new[key]]
    if changed:
        raise ResumeError(f"--resume: expected task {name} as in the file, but {', '.join(changed)} differ")


def print_tables(results: Results) -> None:
    """A table a task and mode, from the summary."""
    for task, known in results["tasks"].items():
        names = [main_metric(results, task), *attacks(results, task)]
        for mode in MODES:
            entries = [entry for entry in results["summary"] if (entry["task"], entry["mode"]) == (task, mode)]
            if not entries:
                continue
            print(f"\n{known['title']}, {mode}")
            width = max(len(entry["method"]) for entry in entries)
            table = Table(
                [("method", width), ("seeds", 5), ("steps", 5), ("of standard", 11), ("train s", 8)]
                + [(name, 24) for name in names],
                text_columns=1,
            )
            for entry in entries:
                figures = [entry["figures"][name] for name in names]
                table.row(
                    entry["method"],
                    str(len(entry["seeds"])),
                    str(entry["steps"]),
                    ratio(entry["of_standard"]),
                    f"{entry['train_seconds']:.1f}",
                    *(format(Quartiles(one["lower"], one["median"], one["upper"]), ".4f") for one in figures),
                )
    print("\nmedian [quartiles] over seeds" + "".join(f"\n{sentence}" for sentence in results["verdict"]))


def open_results(path: Path, chosen: argparse.Namespace, known: dict[str, Any]) -> Results:
    """A new file's content, or that of the file to be resumed."""
    settings = settings_of(chosen)
    if not path.exists() or chosen.overwrite:
        return new_results(known, settings)
    if not chosen.resume:
        raise ResumeError(f"{path}: is there already; --resume continues it, --overwrite replaces it")
    results = read_results(path)
    check_settings(results["settings"], settings)
    results["settings"], results["resumed"] = settings, [*results["resumed"], known]
    return results


def measure_all(results: Results, path: Path, chosen: argparse.Namespace) -> None:
    """Calibrate every task, then run what is missing; the file is written after each."""
    import transformers

    start = Start(chosen.model or bundled_model(), chosen.learning_rate, torch.device(chosen.device))
    tokenizer = transformers.AutoTokenizer.from_pretrained(start.source)
    benches = {}
    for name in chosen.tasks:
        benches[name] = bench = TaskBench(name, chosen, start, tokenizer)
        known = bench.facts()
        if name in results["tasks"]:
            check_task(results["tasks"][name], known, name)
        else:
            results["tasks"][name] = bench.calibrate(known)
            save(results, path)
        found = results["tasks"][name]
        print(f"{found['title']}: {len(bench.data.train)} training and {len(bench.data.dev)} development examples")
        for method, timing in found["calibration"].items():
            steps = found["equal_time_steps"][method]
            print(
                f"  {method}: {1e3 * timing['median_s']:.1f} ms a step, {found['steps']} steps, at equal time {steps}"
            )
    pending = [job for name in chosen.tasks for job in jobs(results, name, range(chosen.seeds))]
    print(f"{len(pending)} runs, about {seconds_left(results, pending) / 60:.1f} minutes", flush=True)
    for number, job in enumerate(pending, 1):
        results["runs"].append(run := benches[job.task].run(job))
        save(results, path)
        figures = ", ".join(f"{name} {value:.4f}" for name, value in run["figures"].items())
        left = seconds_left(results, pending[number:]) / 60
        print(
            f"[{number}/{len(pending)}] {job.task}, {job.method}, seed {job.seed}, {job.steps} steps: {figures}; "
            f"{left:.1f} minutes left",
            flush=True,
        )


def main(given: list[str] | None = None) -> int:
    chosen = arguments(given)
    try:
        if chosen.plot is not None:
            print(f"written: {draw(read_results(chosen.plot), chosen.plot.with_suffix('.svg'))}")
            return 0
        if chosen.threads:
            torch.set_num_threads(chosen.threads)
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        known = facts(torch.device(chosen.device))
        print(describe(known))
        path = result_path(chosen.json, "quality", known)
        results = open_results(path, chosen, known)
        interrupted = False
        try:
            measure_all(results, path, chosen)
        except KeyboardInterrupt:
            interrupted = True
            print(f"\ninterrupted; --resume goes on with {path}", file=sys.stderr)
        if results["runs"]:
            save(results, path)
            print_tables(results)
            print(f"written: {path}, {draw(results, path.with_suffix('.svg'))}")
        return INTERRUPTED if interrupted else 0
    except (CorpusError, TrainingError, ResumeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
