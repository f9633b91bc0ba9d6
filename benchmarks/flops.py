"""The counted floating-point bound of each whole-step shape, without a GPU and without a model in memory.

    python -m benchmarks.flops [--shape NAME ...] [--json PATH]

Counted are the multiplications and additions of matrix products, two a pair. Embedding look-ups, softmax, normalisation
and everything else that works element by element count as zero. Attention counts as dense, causal or not: S^2 products
a head. Padding counts, since it is computed. With, for one forward pass,

    linear       products with weights: layers, the pooler of a classifier, the dense layer of a masked LM's head
    attention    Q K^T and P V; they have no weights, so that their gradients are two products each, always
    row          the vocabulary's projection for one row: 2 H V
    positions    B S;   labelled    rows that have a label;   compared    rows that the divergence compares

a step without its optimizer (zero_grad, forward, backward) takes

    standard     3 linear + 3 attention + 3 positions row
                 forward, gradient to the input, gradient to the weights; the model computes logits at all positions
    naive        8 linear + 9 attention + 8 positions row
                 forwards: clean, ascent, final; gradients to the inputs of all three, to the weights of two
    exact        8 linear + 9 attention + (3 labelled + 9 compared) row
                 the same passes with the vocabulary's projection on the rows alone that need it: task loss 3; ascent 3
                 (logits of both sides, gradient to the adversarial hidden states); trained divergence 6 (logits,
                 gradients to hidden states and gradients to the weights, each of both sides)
    rho          the clean pass whole, the rest of exact on a fraction rho of the batch

What a kernel computes again to save memory (flash attention's backward, checkpoints) is not counted. ``bound`` is exact
over standard: the least that a step of this algorithm can cost beside a standard one, if every product runs equally
fast and everything else is free. A step that keeps logits instead of forming them anew needs 8 products a row where
exact counts 12: where every position is labelled, as in a causal LM, naive counts less than exact.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .machine import facts, write_results
from .shapes import SHAPES, Shape, labelled_rows, shapes_named
from .table import Table, ratio

FRACTION = 0.25
"""rho: the share of the batch that the regulariser of the cheaper step sees."""


@dataclass(frozen=True)
class Forward:
    """Operations of one forward pass; what a step makes of them.

    Attributes:
        linear: products with weights, but for the vocabulary's.
        attention: products of attention.
        row: the vocabulary's projection for one row; 0 without one.
        positions: rows that the model projects by itself.
    """

    linear: int
    attention: int
    row: int
    positions: int

    @property
    def total(self) -> int:
        """The forward pass itself, logits at all positions."""
        return self.linear + self.attention + self.row * self.positions

    @property
    def input_backward(self) -> int:
        """Its backward to the embeddings alone."""
        return self.linear + 2 * self.attention + self.row * self.positions

    @property
    def full_backward(self) -> int:
        """Its backward to embeddings and weights."""
        return 2 * self.total

    @property
    def standard(self) -> int:
        """A standard step."""
        return self.total + self.full_backward

    @property
    def naive(self) -> int:
        """An adversarial step with one ascent through all logits."""
        return 3 * self.total + self.input_backward + 2 * self.full_backward

    def exact(self, labelled: int, compared: int | None = None, fraction: float = 1.0) -> float:
        """The exact step with one ascent.

        Args:
            labelled: rows with a label.
            compared: rows of the divergence on the whole batch; None compares the labelled ones.
            fraction: share of the batch that the regulariser sees.
        """
        compared = labelled if compared is None else compared
        clean = 3 * (self.linear + self.attention) + 3 * labelled * self.row
        return clean + fraction * (5 * self.linear + 6 * self.attention + 9 * compared * self.row)

    def bound(self, labelled: int, compared: int | None = None, fraction: float = 1.0) -> float:
        """:meth:`exact` over :attr:`standard`."""
        return self.exact(labelled, compared, fraction) / self.standard


def forward_of(config: Any, task: str, batch: int, length: int) -> Forward:
    """Operations of a forward pass.

    Args:
        config: Hugging Face configuration of a BERT, a RoBERTa or a Llama.
        task: one of :data:`benchmarks.shapes.TASKS`.
        batch: sequences.
        length: tokens of a sequence.

    Raises:
        ValueError: another architecture, or a task that its head is not counted for.
    """
    hidden, heads, positions = config.hidden_size, config.num_attention_heads, batch * length
    if config.model_type in ("bert", "roberta") and task != "causal_lm":
        queries = keys = hidden
        matrices = 2
    elif config.model_type == "llama" and task == "causal_lm":
        size = config.head_dim or hidden // heads
        queries, keys = heads * size, config.num_key_value_heads * size
        matrices = 3  # gate, up and down
    else:
        raise ValueError(
            f"config: expected a bert or roberta with a class or masked-LM head, or a causal llama, "
            f"got {config.model_type} for {task}"
        )
    weights = 2 * hidden * queries + 2 * hidden * keys + matrices * hidden * config.intermediate_size
    linear = 2 * positions * config.num_hidden_layers * weights
    if task == "classification":
        linear += 2 * batch * hidden * (hidden + config.num_labels)
    elif task == "masked_lm":
        linear += 2 * positions * hidden * hidden
    attention = 4 * batch * config.num_hidden_layers * length * length * queries
    row = 0 if task == "classification" else 2 * hidden * config.vocab_size
    return Forward(linear, attention, row, positions)


def forward_of_shape(shape: Shape) -> Forward:
    """Operations of one forward pass of a shape."""
    return forward_of(shape.configuration(), shape.task, shape.batch, shape.length)


def count(shape: Shape) -> dict[str, Any]:
    """Everything that is printed about a shape, as JSON has it."""
    forward, labelled = forward_of_shape(shape), labelled_rows(shape, shape.make_batch(torch.device("cpu")))
    return {
        "shape": shape.name,
        "task": shape.task,
        "model": shape.model,
        "batch": shape.batch,
        "length": shape.length,
        "labelled": labelled,
        "standard_flops": forward.standard,
        "naive_flops": forward.naive,
        "exact_flops": forward.exact(labelled),
        "naive_of_standard": forward.naive / forward.standard,
        "bound": forward.bound(labelled),
        "fraction": FRACTION,
        "bound_at_fraction": forward.bound(labelled, fraction=FRACTION),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), help="shapes to count (all)")
    parser.add_argument("--json", type=Path, help="file or folder for the results")
    options = parser.parse_args(arguments)
    try:
        shapes = shapes_named(options.shape)
    except ValueError as error:
        parser.error(str(error))
    print("10^12 operations of a step, and multiples of the standard one")
    table = Table(
        [
            ("shape", 26), ("labelled", 8), ("standard", 9), ("naive", 9), ("exact", 9), ("naive", 6), ("bound", 6),
            (f"rho {FRACTION}", 8),
        ],
        text_columns=1,
    )  # fmt: skip
    results = []
    for shape in shapes:
        found = count(shape)
        table.row(
            shape.name,
            str(found["labelled"]),
            *(f"{found[f'{step}_flops'] / 1e12:.4f}" for step in ("standard", "naive", "exact")),
            *(ratio(found[name]) for name in ("naive_of_standard", "bound", "bound_at_fraction")),
        )
        results.append(found)
    if options.json:
        write_results(options.json, "flops", facts(torch.device("cpu")), results=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
