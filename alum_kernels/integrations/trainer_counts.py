"""What a ``transformers.Trainer`` counts of an optimizer step, and what it then does to a micro-batch's loss."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Trainer

from alum_kernels.adversarial.labels import IGNORED_LABEL


def count_items(trainer: Trainer, batch: Mapping[str, Any]) -> Tensor:
    """Items of a micro-batch as the Trainer counts those of a step: labels that are not ignored, a device scalar."""
    labels = batch.get("shift_labels")
    if labels is None:
        labels = batch["labels"]
        if getattr(trainer, "_loss_shifts_labels", False):
            labels = labels[..., 1:]
    return labels.ne(IGNORED_LABEL).sum()


def loss_is_scaled(trainer: Trainer, num_items_in_batch: Tensor | int | None) -> bool:
    """Whether the Trainer takes the loss of a micro-batch as it is; else it divides by :func:`micro_batches`.

    Args:
        trainer: whose ``loss_is_scaled_for_ga`` decides where there is one.
        num_items_in_batch: items of the whole optimizer step, or None if the Trainer does not count them.
    """
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        scaled = counted or trainer.compute_loss_func is not None
    return scaled


def micro_batches(trainer: Trainer) -> int:
    """Micro-batches of the present optimizer step; an epoch's last step may have fewer than the others."""
    return getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)
