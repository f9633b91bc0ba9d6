"""The task's loss of a micro-batch, as the parent of an adversarial Trainer computes it.

A step takes the mean over a micro-batch, so the parent is run as if the micro-batch were a whole optimizer step of one
process: it is given the micro-batch's count of items, and neither divides by steps nor multiplies by processes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from alum_kernels.adversarial.objectives import AdversarialObjective

ComputeLoss = Callable[..., Any]
"""``Trainer.compute_loss`` of the parent, bound."""


class ParentLoss:
    """Of transformers' own ``compute_loss``: the model's loss, label smoothing or ``compute_loss_func``.

    Attributes:
        standard: the loss is the model's own, so that a linear head may stand in for it.
        without_logits: the loss takes no logits, as ``AdversarialObjective.forward`` knows it.
    """

    without_logits = False

    def __init__(self, trainer: Trainer, compute_loss: ComputeLoss) -> None:
        self._trainer, self._compute_loss = trainer, compute_loss

    @property
    def standard(self) -> bool:
        return self._trainer.compute_loss_func is None and self._trainer.label_smoother is None

    def check(self, objective: AdversarialObjective) -> None:
        """Raises ValueError where the objective cannot go with this loss."""

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as all passes get it."""
        return batch

    def of(self, module: nn.Module, part: Mapping[str, Any], items: Tensor | None) -> tuple[Tensor, Any]:
        """Mean loss over some samples, and what the model returned.

        Args:
            module: the model, or the one inside ``DistributedDataParallel``.
            part: its arguments, labels included.
            items: of these samples; None where the Trainer counts none.
        """
        # losses outside the model divide by the count that they are given; heads take the mean
        count = None if items is None or self.standard else items.clamp(min=1)
        with one_micro_batch(self._trainer):
            return self._compute_loss(module, dict(part), return_outputs=True, num_items_in_batch=count)


class OwnLoss(ParentLoss):
    """Of a ``compute_loss`` that is the user's: it runs as it is, on the logits."""

    standard = False

    def of(self, module: nn.Module, part: Mapping[str, Any], items: Tensor | None) -> tuple[Tensor, Any]:
        """As of the parent.

        Raises:
            TypeError: ``compute_loss`` gave no pair.
            ValueError: it gave outputs that its loss does not come from.
        """
        result = super().of(module, part, items)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                f"{name_of(self._compute_loss)}: expected (loss, outputs) with return_outputs=True, "
                f"got {type(result).__name__}"
            )
        loss, outputs = result
        objective = self._trainer.objective
        if torch.is_grad_enabled() and objective.config.compares:
            for head in objective.head.parts:
                if not head.logits(outputs).requires_grad:
                    raise ValueError(
                        f"{name_of(self._compute_loss)}: expected outputs of the pass that the loss is of, got "
                        f"{head.field} without a gradient; return what the model returned, not a detached copy"
                    )
        return loss, outputs


@contextmanager
def one_micro_batch(trainer: Trainer) -> Iterator[None]:
    """Within the context the Trainer knows of one micro-batch in one process."""
    args = trainer.args
    before = args.average_tokens_across_devices, args.gradient_accumulation_steps
    steps = getattr(trainer, "current_gradient_accumulation_steps", 1)
    args.average_tokens_across_devices, args.gradient_accumulation_steps = False, 1
    trainer.current_gradient_accumulation_steps = 1
    try:
        yield
    finally:
        args.average_tokens_across_devices, args.gradient_accumulation_steps = before
        trainer.current_gradient_accumulation_steps = steps


def name_of(method: Callable[..., Any]) -> str:
    """``Class.method`` as it was written."""
    return getattr(method, "__qualname__", repr(method))
