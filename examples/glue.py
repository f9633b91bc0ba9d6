"""Fine-tune on a GLUE task or on named entities, with and without an adversary, over several seeds.

    python -m examples.glue --task cola --data FOLDER                  standard, ALUM as published, ALUM that climbs
    python -m examples.glue --task rte --data hub --seeds 5            a task of the Hugging Face Hub
    python -m examples.glue --task ner --data FOLDER --length 64       entities from IOB files
    python -m examples.glue --task stsb --data FOLDER --method standard,smart --epochs 3 --output stsb.json

FOLDER has train.tsv and dev.tsv in the published format (NER: devel.tsv or dev.tsv), or a folder called as the task
was published (CoLA, RTE, MRPC, STS-B, SST-2) that has them. Prints median and quartiles over the seeds. A seed draws
the order of the examples, the new head, dropout and the adversary's noise; all methods see the same examples in the
same order.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import alum_kernels
from alum_kernels.corpora import CorpusError
from alum_kernels.evaluation.quartiles import Quartiles
from examples.encoding import dev_set, training_batches
from examples.fine_tuning import Start, bundled_model, check_methods, evaluate, fine_tune
from examples.glue_metrics import LABELS
from examples.glue_tasks import TASKS, Task, TaskData, read_task
from examples.methods import METHODS, STANDARD, chosen_methods, method_config
from examples.training import MethodError, Run

DEFAULT_METHODS = "standard,alum_finetuning,alum_linf"
DEFAULT_STEPS = 100
INTERRUPTED = 130


@dataclass
class Results:
    """What was asked for, and the runs so far; tables and files are made from this alone."""

    settings: dict[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False

    def summary(self) -> list[dict[str, Any]]:
        """One entry a method: every metric's :class:`Quartiles` over the seeds, and its cost."""
        entries: list[dict[str, Any]] = []
        for method in dict.fromkeys(run["method"] for run in self.runs):
            own = [run for run in self.runs if run["method"] == method]
            gains = [run["ascent_gain"] for run in own if run["ascent_gain"] is not None]
            entries.append(
                {
                    "method": method,
                    "seeds": len(own),
                    "metrics": {
                        name: Quartiles.of([run["metrics"][name] for run in own]).to_dict()
                        for name in own[0]["metrics"]
                    },
                    "ascent_gain": Quartiles.of(gains).median if gains else None,
                    "ms_per_step": Quartiles.of([run["ms_per_step"] for run in own]).median,
                }
            )
        standard = next((entry["ms_per_step"] for entry in entries if entry["method"] == STANDARD), None)
        for entry in entries:
            entry["of_standard"] = entry["ms_per_step"] / standard if standard else None
        return entries

    def table(self, task: Task) -> list[str]:
        """Aligned lines."""
        rows = [("method", "seeds", *(LABELS[name] for name in task.metrics), "ascent gain", "ms/step", "overhead")]
        for entry in self.summary():
            gain, cost = entry["ascent_gain"], entry["of_standard"]
            rows.append(
                (
                    entry["method"],
                    str(entry["seeds"]),
                    *(format(Quartiles(**entry["metrics"][name]), ".4f") for name in task.metrics),
                    "-" if gain is None else f"{gain:.3g}",
                    f"{entry['ms_per_step']:.0f}",
                    "-" if cost is None else f"{cost:.2f}x",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return [lines[0], "-" * len(lines[0]), *lines[1:]]

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "settings": self.settings,
            "interrupted": self.interrupted,
            "summary": self.summary(),
            "runs": self.runs,
        }
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.glue", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=tuple(TASKS), required=True)
    parser.add_argument("--data", required=True, help="folder of the task's files, or hub")
    parser.add_argument("--model", help="name or path of a pretrained model (default: the bundled MiniLM, offline)")
    parser.add_argument(
        "--method",
        default=DEFAULT_METHODS,
        help=f"comma-separated, of {', '.join(METHODS)} (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: %(default)s)")
    parser.add_argument("--train-examples", type=int, help="a random part of the training examples (all)")
    parser.add_argument("--dev-examples", type=int, help="a random part of the development examples (all)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help=f"batches a run is trained on (default: {DEFAULT_STEPS})")
    length.add_argument("--epochs", type=float, help="the same in passes over the training examples")
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--length", type=int, default=64, help="tokens a sequence at most (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads (all that PyTorch takes)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    chosen = parser.parse_args(given)
    try:
        chosen.method = chosen_methods(chosen.method)
    except ValueError as error:
        parser.error(f"--method: {error}")
    for name in ("seeds", "train_examples", "dev_examples", "steps", "batch_size", "threads"):
        value = getattr(chosen, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if chosen.epochs is not None and not chosen.epochs > 0:
        parser.error(f"--epochs: expected more than 0, got {chosen.epochs}")
    if chosen.length < 8:
        parser.error(f"--length: expected at least 8, got {chosen.length}")
    if not chosen.learning_rate > 0:
        parser.error(f"--learning-rate: expected more than 0, got {chosen.learning_rate}")
    return chosen


def run_method(method: str, seed: int, data: TaskData, tokenizer, dev, start: Start, chosen) -> dict[str, Any]:
    """Fine-tune and judge one method with one seed."""
    batches = training_batches(
        tokenizer, data, steps=chosen.steps, size=chosen.batch_size, length=chosen.length, seed=seed
    )
    run = Run(data.task.title, f"{method}, seed {seed}")
    model = fine_tune(data, batches, run, method_config(method, data.task.freelb), start, seed=seed)
    return {
        "method": method,
        "seed": seed,
        "steps": len(batches),
        "metrics": evaluate(model, data, dev),
        "ascent_gain": run.mean_telemetry("ascent_gain"),
        "ms_per_step": 1e3 * run.seconds_per_step,
        "train_seconds": sum(run.seconds),
        "losses": run.losses,
    }


def main(given: list[str] | None = None) -> int:
    chosen = arguments(given)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start = Start(chosen.model or bundled_model(), chosen.learning_rate, torch.device(chosen.device))
    results = None
    try:
        data = read_task(chosen.task, chosen.data).limited(chosen.train_examples, chosen.dev_examples)
        if chosen.batch_size > len(data.train):
            raise CorpusError(
                f"--batch-size: expected at most {len(data.train)} training examples, got {chosen.batch_size}"
            )
        if chosen.epochs is not None:
            chosen.steps = max(1, round(chosen.epochs * (len(data.train) // chosen.batch_size)))
        chosen.steps = chosen.steps or DEFAULT_STEPS
        results = Results(_settings(chosen, data))
        tokenizer = transformers.AutoTokenizer.from_pretrained(start.source)
        print(
            f"{data.task.title}: {len(data.train)} training and {len(data.dev)} development examples; "
            f"{chosen.steps} steps of {chosen.batch_size}, {chosen.seeds} seeds, {torch.get_num_threads()} threads, "
            f"device {chosen.device}"
        )
        check_methods(data, [method_config(method, data.task.freelb) for method in chosen.method], start)
        dev = dev_set(tokenizer, data, size=chosen.batch_size, length=chosen.length)
        for seed in range(chosen.seeds):
            for method in chosen.method:
                results.runs.append(run_method(method, seed, data, tokenizer, dev, start, chosen))
                figures = ", ".join(
                    f"{LABELS[name]} {value:.4f}" for name, value in results.runs[-1]["metrics"].items()
                )
                print(f"  {method}, seed {seed}: {figures}", flush=True)
    except (CorpusError, MethodError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: what was measured so far follows", file=sys.stderr)
        if results is not None and results.runs:
            results.interrupted = True
            _report(results, data, chosen.output)
        return INTERRUPTED
    _report(results, data, chosen.output)
    return 0


def _settings(chosen: argparse.Namespace, data: TaskData) -> dict[str, Any]:
    import transformers

    return {
        "task": chosen.task,
        "model": chosen.model or "all-MiniLM-L6-v2 (6 layers, hidden 384)",
        "train_examples": len(data.train),
        "dev_examples": len(data.dev),
        "steps": chosen.steps,
        "batch_size": chosen.batch_size,
        "length": chosen.length,
        "learning_rate": chosen.learning_rate,
        "device": torch.cuda.get_device_name() if chosen.device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {
            "alum_kernels": alum_kernels.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _report(results: Results, data: TaskData, output: Path | None) -> None:
    print("\n" + "\n".join(results.table(data.task)))
    print("median [quartiles] over seeds; ms/step: median, methods one after another")
    if output is not None:
        results.write(output)
        print(f"written: {output}")


if __name__ == "__main__":
    sys.exit(main())
