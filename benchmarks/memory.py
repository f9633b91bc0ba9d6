"""Peak memory of a whole step: standard training and every adversarial method, on the pretrained MiniLM.

    python -m benchmarks.memory [--task classification|masked_lm|both] [--batch 16 --length 64] [--only NAME ...]
                                [--threads 2] [--device cpu|cuda] [--json PATH]

Bytes are those of tensors that a step holds at its peak besides what was held before it, as the allocator counts them;
parameters and batch are held before. Each step is measured twice, after an unmeasured one on two samples.

    peak           without gradients before (zero_grad(set_to_none=True)): those of the parameters count
    activations    with gradients before, which the step adds to: they do not count; what a backward makes before it is
                   added does. Where a step frees and makes gradients itself (freeat), its gradients count here too
    forwards       passes through the model's end, as shares of the batch; passes through the first layer alone not

Standard training is ``outputs.loss.backward()``. ``memory="low"`` is meant to hold 1.1 times its activations at most.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.adversarial.config import PRESETS
from alum_kernels.adversarial.samples import sample_count, select_samples

from .machine import machine_of, write_results
from .machine_options import add_machine_options
from .naive_step import all_positions, class_rows, naive_adversarial_step, standard_step
from .shapes import MINILM_TASKS, minilm
from .table import Table, ratio
from .timing import peak_memory

Batch = Mapping[str, Tensor]
BatchStep = Callable[[Batch], object]

ALUM = AdversarialConfig.alum_finetuning
LEARNING_RATE = 1e-5
GOAL = 1.1
"""Activations of ``memory="low"``, of the standard step's at most."""


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: of the row.
        config: of the objective; None for steps without one.
        note: what a reader should know.
    """

    name: str
    config: AdversarialConfig | None = None
    note: str = ""


def methods() -> list[Method]:
    """Standard training first."""
    return [
        Method("standard"),
        Method("naive", note="ALUM in plain PyTorch; a masked LM compared at all positions"),
        *(Method(name, getattr(AdversarialConfig, name)(), _NOTES.get(name, "")) for name in PRESETS),
        Method("alum, memory low", ALUM(memory="low"), "one graph at a time"),
        Method("alum, fraction 0.25", ALUM(adversarial_fraction=0.25), "a quarter of the samples is perturbed"),
        Method("alum, depth 3", ALUM(ascent_depth=3), "perturbed passes skip three layers"),
        Method("smart, proximal", AdversarialConfig.smart(proximal=1.0), "a teacher, held before, has a pass"),
    ]


_NOTES = {
    "freeat": "an update of the parameters between the replays",
    "yopo": "and nine passes through the first layer",
    "llr": "second derivatives; a masked LM through its logits",
}


class Prepared:
    """A method's step on a model.

    Args:
        method: the row.
        task: the model's.
        model: in training mode.

    Attributes:
        step: forward and backward on a batch, labels included; gradients are added to those there are.
        remove: takes the method's hooks off the model.
    """

    def __init__(self, method: Method, task: str, model: nn.Module) -> None:
        self.remove: Callable[[], None] = lambda: None
        if method.name == "standard":
            self.step: BatchStep = partial(standard_step, model)
            return
        if method.name == "naive":
            rows = class_rows if task == "classification" else all_positions
            constants = {name: getattr(ALUM(), name) for name in ("alpha", "std", "step_size", "epsilon")}
            self.step = lambda batch: naive_adversarial_step(model, batch, rows, **constants)
            return
        objective = AdversarialObjective(model, method.config)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        if method.config.proximal > 0:
            objective.follow(optimizer)
        options: dict[str, Any] = {}
        if method.config.backward == "replay":
            options["update"] = partial(_update, optimizer)
        self.step = partial(objective.backward, **options)
        self.remove = objective.remove_hooks


def _update(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def counted_forwards(model: nn.Module) -> Iterator[list[int]]:
    """Within the context, the list receives the number of samples of each pass through the model's end."""
    samples: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = (*args, *kwargs.values())
        samples.append(next(value.shape[0] for value in given if isinstance(value, Tensor) and value.dim() > 0))

    handle = model.register_forward_hook(count, with_kwargs=True)
    try:
        yield samples
    finally:
        handle.remove()


def measured(step: BatchStep, model: nn.Module, batch: Batch, device: torch.device) -> dict[str, Any]:
    """Peak and activations in bytes, and the forwards."""
    samples = sample_count(batch)
    # makes what a method makes once, such as the check of a linear head
    step(select_samples(batch, torch.arange(min(2, samples), device=device), samples))
    model.zero_grad(set_to_none=True)
    with counted_forwards(model) as rows:
        peak = peak_memory(lambda: step(batch), device)
    activations = peak_memory(lambda: step(batch), device)  # the step before has left its gradients
    model.zero_grad(set_to_none=True)
    return {"peak_bytes": peak, "activation_bytes": activations, "forwards": sum(rows) / samples}


def run_task(task: str, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure and print one task."""
    shape = minilm(task, options.batch, options.length)
    model = shape.make_model(device)
    batch = shape.make_batch(device)
    print(f"\n{task}: {type(model).__name__}, batch {options.batch} x {options.length}")
    table = Table(
        [
            *(("method", 20), ("peak MiB", 9), ("of standard", 11)),
            *(("activations MiB", 15), ("of standard", 11), ("forwards", 8)),
        ],
        text_columns=1,
    )
    results: list[dict[str, Any]] = []
    for method in methods():
        if options.only and method.name not in ("standard", *options.only):
            continue
        prepared = Prepared(method, task, model)
        found = measured(prepared.step, model, batch, device)
        prepared.remove()
        base = results[0] if results else found
        row = {
            "method": method.name,
            "task": task,
            "batch": options.batch,
            "length": options.length,
            "peak_bytes": found["peak_bytes"],
            "activation_bytes": found["activation_bytes"],
            "of_standard": found["peak_bytes"] / base["peak_bytes"],
            "activations_of_standard": found["activation_bytes"] / base["activation_bytes"],
            "forwards": found["forwards"],
            "note": method.note,
        }
        results.append(row)
        table.row(
            method.name,
            f"{row['peak_bytes'] / 2**20:.1f}",
            ratio(row["of_standard"]),
            f"{row['activation_bytes'] / 2**20:.1f}",
            ratio(row["activations_of_standard"]),
            f"{row['forwards']:.2f}",
        )
    low = next((row["activations_of_standard"] for row in results if row["method"] == "alum, memory low"), None)
    if low is not None:
        verdict = "within" if low <= GOAL else "beyond"
        print(f"activations of memory='low': {low:.3f} of standard, {verdict} the goal of {GOAL}")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [method.name for method in methods()]
    parser.add_argument("--task", choices=(*MINILM_TASKS, "both"), default="both")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {'; '.join(names)}")
    add_machine_options(parser)
    options = parser.parse_args(arguments)
    device, known = machine_of(options)
    weights = minilm("classification").weights()
    print(f"MiniLM, six layers, {weights}")
    results = []
    for task in MINILM_TASKS if options.task == "both" else (options.task,):
        results += run_task(task, options, device)
    if options.json:
        write_results(options.json, "memory", known, weights=weights, results=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
