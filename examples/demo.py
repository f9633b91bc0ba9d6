"""The main job on real text: masked-LM pre-training, then a classifier, with and without an adversary.

    python -m examples.demo                                     everything, on text that every CPython carries
    python -m examples.demo --train train.tsv --dev dev.tsv     a task of your own, as alum-kernels train reads it
    python -m examples.demo --dataset glue:cola                 a data set of the Hugging Face Hub
    python -m examples.demo --method standard,smart             methods by name

Prints a table and writes report.html with plots.
"""

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

import alum_kernels
from alum_kernels import AdversarialConfig
from alum_kernels.evaluation import accuracy_under_attack, largest_loss_increase, local_smoothness
from alum_kernels.training.errors import TrainingError
from alum_kernels.training.hub import HUB
from alum_kernels.training.models import bundled_model
from examples import corpora, report, training
from examples.methods import METHODS, chosen_methods, method_config

ATTACK_RADIUS = 5e-3
ATTACK_STEPS = 3

PRE_TRAINING = {"standard": None, "alum_pretraining": AdversarialConfig.alum_pretraining()}
"""The paper's curriculum: standard training first, ALUM from where it ended."""

DEFAULT_METHODS = ("standard", "alum_finetuning", "alum_linf")

TITLES = {
    "alum_pretraining": "ALUM as published",
    "alum_finetuning": "ALUM as published",
    "alum_linf": "ALUM, normalised, eps 1e-2 (not the paper's)",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="name or path of a pretrained model (default: the bundled MiniLM, offline)")
    parser.add_argument("--train", type=Path, help="training examples: .tsv, .csv or .jsonl")
    parser.add_argument("--dev", type=Path, help="development examples, likewise")
    parser.add_argument("--dataset", help="a Hub data set, such as glue:cola")
    parser.add_argument(
        "--method",
        default=",".join(DEFAULT_METHODS),
        help=f"comma-separated, of {', '.join(METHODS)} (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=20, help="fine-tuning steps (default: %(default)s)")
    parser.add_argument(
        "--pretraining-steps",
        type=int,
        default=8,
        help="steps of each half of the curriculum; 0 skips it (%(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=48, help="tokens a sequence (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument(
        "--dev-examples", type=int, default=96, help="evaluated examples at most (default: %(default)s)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    chosen = parser.parse_args()
    try:
        chosen.method = chosen_methods(chosen.method)
    except ValueError as error:
        parser.error(f"--method: {error}")
    if (chosen.train is None) != (chosen.dev is None):
        parser.error("--train and --dev come together")
    if chosen.train is not None and chosen.dataset is not None:
        parser.error("--dataset and --train exclude each other")
    for name in ("steps", "batch_size", "dev_examples"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(chosen, name)}")
    if chosen.pretraining_steps < 0 or chosen.length < 8:
        parser.error("--pretraining-steps: expected at least 0; --length: at least 8")
    return chosen


def labelled_task(chosen: argparse.Namespace) -> corpora.Classification:
    if chosen.train is not None:
        return corpora.given_classification(str(chosen.train), str(chosen.dev))
    if chosen.dataset is not None:
        return corpora.given_classification(HUB + chosen.dataset)
    return corpora.docstring_classification(chosen.seed)


def pre_train(
    chosen: argparse.Namespace, tokenizer, paragraphs: list[str], source: str, runs: list, folder: str
) -> str:
    """Both halves of the curriculum; where the model was left."""
    from transformers import AutoModelForMaskedLM

    size, steps, device = chosen.batch_size, chosen.pretraining_steps, torch.device(chosen.device)
    batches, held_out = training.masked_lm_batches(
        tokenizer, paragraphs, size=size, length=chosen.length, seed=chosen.seed, steps=2 * steps
    )
    if len(batches) < 2 * steps:
        raise corpora.CorpusError(
            f"--pretraining-steps: expected at most {len(batches) // 2} for text of {len(batches)} batches, got {steps}"
        )
    model = AutoModelForMaskedLM.from_pretrained(source)
    for number, (method, config) in enumerate(PRE_TRAINING.items()):
        run = training.Run("masked LM", TITLES.get(method, method))
        runs.append(run)
        part = batches[number * steps : (number + 1) * steps]
        training.train(model, part, run, config, learning_rate=chosen.learning_rate, device=device)
        evaluate(model, held_out[:2], run)
    model.save_pretrained(folder)
    return folder


def fine_tune(chosen: argparse.Namespace, tokenizer, task: corpora.Classification, source: str, runs: list) -> None:
    """Every chosen method from the same start on the same batches."""
    from transformers import AutoModelForSequenceClassification

    device = torch.device(chosen.device)
    shape = {"size": chosen.batch_size, "length": chosen.length}
    shuffled = torch.Generator().manual_seed(chosen.seed)
    batches = training.take(
        training.classification_batches(tokenizer, task.train, **shape, generator=shuffled), chosen.steps
    )
    if not batches:
        raise corpora.CorpusError(
            f"{task.name}: expected at least --batch-size {chosen.batch_size} training examples, got {len(task.train)}"
        )
    held_out = corpora.LabelledText(task.dev.texts[: chosen.dev_examples], task.dev.labels[: chosen.dev_examples])
    dev_batches = list(training.classification_batches(tokenizer, held_out, **shape))
    for method in chosen.method:
        torch.manual_seed(chosen.seed)
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(task.classes))
        run = training.Run("classification", TITLES.get(method, method))
        runs.append(run)
        training.train(model, batches, run, method_config(method), learning_rate=chosen.learning_rate, device=device)
        evaluate(model, dev_batches, run)


def evaluate(model, batches: list[training.Batch], run: training.Run) -> None:
    progress = tqdm(batches, desc="  held-out text and attack", unit="batch", leave=False, dynamic_ncols=True)
    search = {"epsilon": ATTACK_RADIUS, "steps": ATTACK_STEPS, "norm": "linf", "level": "token"}
    robustness = accuracy_under_attack(model, progress, **search)
    run.loss_increase = largest_loss_increase(model, batches[:1], restarts=1, **search)
    run.smoothness = local_smoothness(model, batches[:1], **search)
    run.figures.update(
        loss=robustness.clean_loss,
        accuracy=robustness.clean_accuracy,
        attacked_accuracy=robustness.attacked_accuracy,
    )


def main() -> int:
    chosen = arguments()
    started = time.perf_counter()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(chosen.seed)
    runs: list[training.Run] = []
    interrupted = False
    try:
        source = chosen.model or bundled_model()
        task = labelled_task(chosen)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        own = chosen.train is not None or chosen.dataset is not None
        paragraphs = [" ".join(row) for row in task.train.texts] if own else corpora.documentation_paragraphs()
        print(
            f"{task.name}: {len(task.train)} training and {len(task.dev)} development examples, "
            f"{len(task.classes)} classes; masked LM on {len(paragraphs)} paragraphs; device {chosen.device}"
        )
        with tempfile.TemporaryDirectory() as folder:
            if chosen.pretraining_steps:
                source = pre_train(chosen, tokenizer, paragraphs, source, runs, folder)
            fine_tune(chosen, tokenizer, task, source, runs)
    except (corpora.CorpusError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        interrupted = True
        runs = [run for run in runs if run.seconds]
        print("\ninterrupted: what was measured so far follows", file=sys.stderr)
    if runs:
        facts = {
            "model": chosen.model or "all-MiniLM-L6-v2 (6 layers, hidden 384)",
            "data": task.name,
            "batch": f"{chosen.batch_size} x {chosen.length} tokens",
            "attack": f"{ATTACK_STEPS} steps, linf radius {ATTACK_RADIUS:g}",
            "device": torch.cuda.get_device_name() if chosen.device.startswith("cuda") else platform.machine(),
            "versions": f"alum_kernels {alum_kernels.__version__}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}",
            "time": f"{time.perf_counter() - started:.0f} s" + (", interrupted" if interrupted else ""),
        }
        report.write_html(runs, facts, chosen.output / "report.html")
        print("\n" + "\n".join(report.table_lines(runs)) + f"\n\n{chosen.output / 'report.html'}, {facts['time']}")
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
