"""Which entries of a batch are labels, and which labels do not count."""

from collections.abc import Mapping
from typing import Any

LABEL_KEYS = (
    "labels",
    "label",
    "label_ids",
    "shift_labels",
    "next_sentence_label",
    "start_positions",
    "end_positions",
    "is_impossible",
    "cls_index",
    "num_items_in_batch",
)
"""Entries of a batch that only the task's loss reads; the perturbed passes go without them."""

IGNORED_LABEL = -100


def without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without its labels; ``Head.inputs`` also makes what a model would have made from them."""
    return {key: value for key, value in batch.items() if key not in LABEL_KEYS}
