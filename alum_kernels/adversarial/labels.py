"""Which entries of a batch are labels, and which labels do not count."""

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
