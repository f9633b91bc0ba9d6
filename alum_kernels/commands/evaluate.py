"""What a trained model gets right on a file, and what it withstands in a ball around its embeddings."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from alum_kernels.commands.errors import CommandError
from alum_kernels.commands.failures import check_one_process, in_one_line
from alum_kernels.commands.parser import checked
from alum_kernels.evaluation import accuracy_under_attack, largest_loss_increase, local_smoothness
from alum_kernels.training import atomic, values
from alum_kernels.training.data import numbered, read_held_out, samples_of
from alum_kernels.training.errors import TrainingError, WriteError
from alum_kernels.training.loop import batches_in_order, chosen_device
from alum_kernels.training.models import check_length, load_model, load_tokenizer, read_config, trained_folder
from alum_kernels.training.precision import Precision
from alum_kernels.training.scores import scores
from alum_kernels.training.settings import (
    CAUSAL_LM,
    CLASSIFICATION,
    LABELLED,
    MASKED_LM,
    MOST_THREADS,
    REGRESSION,
    Settings,
)

ENDINGS = {
    "ForSequenceClassification": CLASSIFICATION,
    "ForMaskedLM": MASKED_LM,
    "ForCausalLM": CAUSAL_LM,
    "LMHeadModel": CAUSAL_LM,
}
"""Of the classes of models that are evaluated."""

NORMS = ("linf", "l2")

RADIUS = values.number(above=True, most=1e38)
"""Of the ball. Perturbations are fp32, a step of 2.5 radii included."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", type=Path, help="folder of a trained model, a run or a checkpoint")
    parser.add_argument("--data", required=True, help="held-out data: .tsv, .csv, .jsonl or .txt, or hub:NAME")
    parser.add_argument("--text", default="", help="columns of the text, one or two")
    parser.add_argument("--label", default="", help="column of the label")
    count, width = checked(values.whole(1)), checked(values.whole(8))
    parser.add_argument("--batch-size", type=count, default=16, help="samples of a batch (%(default)s)")
    parser.add_argument("--length", type=width, default=128, help="tokens of a sample at most (%(default)s)")
    parser.add_argument("--epsilon", type=checked(RADIUS), default=5e-3, help="radius of the ball (%(default)s)")
    parser.add_argument("--norm", choices=NORMS, default="linf", help="of the ball (%(default)s)")
    none_or_more = checked(values.whole(0))
    parser.add_argument("--attack-steps", type=none_or_more, default=3, help="ascent steps (%(default)s)")
    parser.add_argument(
        "--attack-samples", type=none_or_more, default=64, help="first samples, attacked; 0: none (%(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where it is)")
    parser.add_argument("--threads", type=checked(values.whole(1, MOST_THREADS)), help="of the CPU")
    parser.add_argument("--seed", type=none_or_more, default=0, help="of the random starts and of masks (%(default)s)")
    parser.add_argument("--json", type=checked(values.path), metavar="FILE", help="also write the figures there")


def run(arguments: argparse.Namespace) -> int:
    """Print a table of the figures."""
    check_one_process("start it as one")
    with in_one_line("a smaller --batch-size or --length"):
        figures = measured(arguments)
    width = max(map(len, figures["figures"]))
    print(f"{arguments.model} on {arguments.data}: {figures['task']}, {figures['samples']} samples")
    for name, value in figures["figures"].items():
        print(f"  {name.replace('_', ' '):{width}}  {value:.6g}")
    if arguments.json is not None:
        path = Path(arguments.json)
        try:
            with atomic.writing(path):
                path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        except WriteError as error:
            raise CommandError(f"--json: {error}", status=1) from error
    return 0


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures, and what they are of.

    Raises:
        TrainingError, CorpusError: a model or data that cannot be used.
    """
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    folder = trained_folder(arguments.model)
    config = read_config(folder)
    task = task_of(config, folder)
    settings = Settings.of(
        {
            "task": task, "train": arguments.data, "dev": arguments.data, "output": "none", "seed": arguments.seed,
            "length": arguments.length, "text": arguments.text.split(",") if arguments.text else (),
            "label": arguments.label,
        }
    )  # fmt: skip
    content = read_held_out(settings)
    if task in LABELLED:
        content = numbered(content, classes_of(config), task)
    device = chosen_device(arguments.device)
    tokenizer = load_tokenizer(str(folder))
    model = load_model(str(folder), task, tokenizer).to(device).eval()
    samples = samples_of(content, settings, tokenizer, held_out=True)
    batches = batches_in_order(samples, arguments.batch_size)
    check_length(model, arguments.length, max(batch["input_ids"].shape[1] for batch in batches))
    figures = scores(model, batches, task, Precision("fp32", device))
    attacked = batches[: -(-arguments.attack_samples // arguments.batch_size)]
    if attacked:
        figures |= withstood(model, attacked, task, arguments)
    return {
        "task": task,
        "samples": samples.count,
        "attacked_samples": sum(len(batch["labels"]) for batch in attacked),
        "epsilon": arguments.epsilon,
        "norm": arguments.norm,
        "attack_steps": arguments.attack_steps,
        "figures": figures,
    }


def withstood(model: Any, batches: list, task: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Figures under attack (:mod:`alum_kernels.evaluation`)."""
    search = {
        "epsilon": arguments.epsilon, "steps": arguments.attack_steps, "norm": arguments.norm, "seed": arguments.seed,
    }  # fmt: skip
    figures = {}
    if task != REGRESSION:
        report = accuracy_under_attack(model, batches, **search)
        figures = {
            "accuracy_of_the_attacked": report.clean_accuracy,
            "accuracy_under_attack": report.attacked_accuracy,
            "loss_under_attack": report.attacked_loss,
        }
    increase = largest_loss_increase(model, batches, restarts=1, **search).quartiles(only_correct=False)
    smoothness = local_smoothness(model, batches, **search)
    return {
        **figures,
        "largest_loss_increase_median": increase.median,
        "divergence_at_random": smoothness.random_mean,
        "divergence_ascended": smoothness.ascended_mean,
    }


def task_of(config: Mapping[str, Any], folder: Path) -> str:
    """What a saved model predicts.

    Raises:
        TrainingError: none of the tasks that are evaluated.
    """
    name = next(iter(config.get("architectures") or []), "")
    task = next((task for ending, task in ENDINGS.items() if name.endswith(ending)), None)
    if task is None:
        raise TrainingError(
            f"model: expected one whose class ends in {', '.join(ENDINGS)}, got {name or 'none'} in {folder}"
        )
    scored = config.get("problem_type") == "regression" or len(classes_of(config)) == 1
    return REGRESSION if task == CLASSIFICATION and scored else task


def classes_of(config: Mapping[str, Any]) -> list[str]:
    """Names of a classifier's classes, in order."""
    named = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # the default, which a file leaves out
    return [str(named[number]) for number in sorted(named, key=int)]
