"""What a regulariser on a part of the batch costs in passes of the model: their sum, each taken alone.

    python -m benchmarks.pass_costs [--shape minilm-cls-16x64] [--fraction 0.25] [--rounds 15] [--threads 2]

A pass over a quarter of the samples costs more than a quarter: products of fewer rows are slower, and some of a pass
does not shrink with its batch (Python, launches, the gradients of the weights). ``benchmarks.flops`` counts a step as
if every product ran equally fast; this is what its passes take in the model without a hook or kernel of this library,
with the clean pass in two parts and each pass drawing its dropout masks. (Where masks are kept, a step takes less.)

    rest          the samples that are not chosen: forward, backward
    part, twice   the chosen ones, clean and perturbed: forward, backward; the embeddings' dense gradient is the rest's
    ascent        the chosen ones: forward, backward to the embeddings alone
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .flops import FRACTION, forward_of_shape
from .machine import describe, facts, write_results
from .shapes import SHAPES, Shape, labelled_rows, shapes_named
from .table import Table, milliseconds, ratio
from .timing import Call, measure

PARTS = {"standard": 0, "rest": 1, "part": 2, "ascent": 1}
"""The passes that are timed, and how often the step on a part has each."""

CLASSIFIERS = tuple(name for name, shape in SHAPES.items() if shape.task == "classification")
Batch = dict[str, Tensor]


def passes(model: nn.Module, batch: Batch, chosen: int) -> dict[str, Call]:
    """Each of :data:`PARTS` as a call; the first ``chosen`` samples are the part."""
    table = model.get_input_embeddings().weight

    def samples(first: int, last: int) -> Batch:
        return {name: values[first:last] for name, values in batch.items()}

    def trained(inputs: Batch) -> None:
        model.zero_grad(set_to_none=True)
        model(**inputs).loss.backward()

    def trained_above_the_embeddings(inputs: Batch) -> None:
        table.requires_grad_(False)
        try:
            trained(inputs)
        finally:
            table.requires_grad_(True)

    def ascent(inputs: Batch) -> Tensor:
        others = {name: values for name, values in inputs.items() if name != "input_ids"}
        leaf = nn.functional.embedding(inputs["input_ids"], table.detach()).requires_grad_()
        return torch.autograd.grad(model(inputs_embeds=leaf, **others).loss, leaf)[0]

    count = batch["input_ids"].shape[0]
    part, rest = samples(0, chosen), samples(chosen, count)
    return {
        "standard": lambda: trained(batch),
        "rest": lambda: trained(rest),
        "part": lambda: trained_above_the_embeddings(part),
        "ascent": lambda: ascent(part),
    }


def run_shape(shape: Shape, fraction: float, rounds: int, device: torch.device) -> dict[str, object]:
    """Medians of the passes, and their sum over a standard step beside the counted bound."""
    model, batch = shape.make_model(device), shape.make_batch(device)
    chosen = round(fraction * shape.batch)
    timings = measure(passes(model, batch, chosen), device=device, rounds=rounds)
    floor = sum(times * timings[name].median for name, times in PARTS.items())
    return {
        "shape": shape.name,
        "fraction": chosen / shape.batch,
        "timings": {name: timing.to_dict() for name, timing in timings.items()},
        "floor_s": floor,
        "floor_of_standard": floor / timings["standard"].median,
        "bound_at_fraction": forward_of_shape(shape).bound(labelled_rows(shape, batch), fraction=chosen / shape.batch),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=CLASSIFIERS, default="minilm-cls-16x64", help="default: %(default)s")
    parser.add_argument("--fraction", type=float, default=FRACTION, help="of the batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each pass (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (all that PyTorch takes)")
    parser.add_argument("--json", type=Path, help="file or folder for the results")
    options = parser.parse_args(arguments)
    (shape,) = shapes_named([options.shape])
    if not 1 <= round(options.fraction * shape.batch) < shape.batch:
        parser.error(f"--fraction: expected some but not all of {shape.batch} samples, got {options.fraction}")
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type not in shape.devices:
        parser.error(f"--shape: {shape.name} is meant for {' and '.join(shape.devices)}")
    known = facts(device)
    print(describe(known))
    found = run_shape(shape, options.fraction, options.rounds, device)
    table = Table([("pass", 10), ("times", 5), ("median ms", 10), ("p20", 8), ("p80", 8)], text_columns=1)
    for name, times in PARTS.items():
        timing = found["timings"][name]
        figures = (milliseconds(timing[key]) for key in ("median_s", "p20_s", "p80_s"))
        table.row(name, str(times), *figures)
    floor, counted = ratio(found["floor_of_standard"]), ratio(found["bound_at_fraction"])
    print(f"sum of the passes {floor} a standard step; counted {counted}")
    if options.json:
        write_results(options.json, "pass-costs", known, results=[found])
    return 0


if __name__ == "__main__":
    sys.exit(main())
