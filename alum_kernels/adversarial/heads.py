"""What a model predicts, and how its clean and perturbed predictions are compared."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alum_kernels.ops.checks import check_choice
from alum_kernels.ops.squared_error import squared_error
from alum_kernels.ops.symmetric_kl import js, kl, symmetric_kl, symmetric_kl_grad

HEADS = ("classification", "regression", "masked_lm")
LABEL_KEYS = ("labels", "label", "label_ids", "next_sentence_label", "num_items_in_batch")
"""Entries of a batch that only the task's loss reads; the perturbed passes go without them."""

IGNORED_LABEL = -100

_DIVERGENCES = {"symmetric_kl": symmetric_kl, "kl": kl, "js": js}


@dataclass(frozen=True)
class Head:
    """How two predictions of one head are compared.

    ``classification`` compares (B, V) logits row by row, ``regression`` squared differences, ``masked_lm`` (B, S, V)
    logits at the labelled positions.
    """

    name: str

    def __post_init__(self) -> None:
        check_choice("head", self.name, HEADS)

    def logits(self, outputs: Any) -> Tensor:
        """The predictions in what a model returned: an object or mapping with ``logits``, or a tensor."""
        if isinstance(outputs, Tensor):
            found = outputs
        elif isinstance(outputs, Mapping):
            found = outputs.get("logits")
        else:
            found = getattr(outputs, "logits", None)
        if not isinstance(found, Tensor):
            raise TypeError(f"model: expected a tensor or an output with 'logits', got {type(outputs).__name__}")
        expected = 3 if self.name == "masked_lm" else 2
        if found.dim() != expected:
            raise ValueError(f"model: expected {expected}-d logits for a {self.name} head, got {tuple(found.shape)}")
        return found

    def row_mask(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Rows that are compared: all, or the labelled positions of a masked-LM batch."""
        if self.name != "masked_lm":
            return None
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            raise ValueError(
                "batch: expected 'labels' (B, S) for a masked_lm head, whose labelled positions are compared"
            )
        return labels != IGNORED_LABEL

    def divergence(
        self,
        adv_logits: Tensor,
        logits: Tensor,
        mask: Tensor | None,
        *,
        divergence: str,
        gradient: str,
        temperature: float,
        backend: str | None,
    ) -> Tensor:
        """Mean over the compared rows, differentiable."""
        if self.name == "regression":
            convention = "detach_clean" if gradient == "detach_clean" else "full"
            return squared_error(adv_logits, logits, mask=mask, gradient=convention)
        return _DIVERGENCES[divergence](
            adv_logits, logits, mask=mask, gradient=gradient, temperature=temperature, backend=backend
        )

    def divergence_and_gradient(
        self,
        adv_logits: Tensor,
        logits: Tensor,
        mask: Tensor | None,
        *,
        divergence: str,
        temperature: float,
        grad_scale: float,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        """Sum over the compared rows and ``grad_scale`` times its gradient to ``adv_logits``; no graph."""
        if self.name != "regression":
            return symmetric_kl_grad(
                adv_logits,
                logits,
                mask=mask,
                reduction="sum",
                gradient="detach_clean",
                temperature=temperature,
                divergence=divergence,
                grad_scale=grad_scale,
                backend=backend,
            )
        with torch.enable_grad():
            leaf = adv_logits.detach().requires_grad_()
            total = squared_error(leaf, logits.detach(), mask=mask, reduction="sum")
        (grad,) = torch.autograd.grad(total * grad_scale, leaf)
        return total.detach(), grad


def detect_head(model: nn.Module) -> Head:
    """The head of a model, from its class name and configuration as Hugging Face models have them.

    Raises:
        ValueError: no head is recognised; the message says how to name one.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if name.endswith("ForMaskedLM"):
        return Head("masked_lm")
    if name.endswith("ForSequenceClassification"):
        problem = getattr(config, "problem_type", None)
        if problem == "multi_label_classification":
            raise ValueError(f"model: {name} with problem_type 'multi_label_classification' has no softmax to compare")
        regression = problem == "regression" or (problem is None and getattr(config, "num_labels", None) == 1)
        return Head("regression" if regression else "classification")
    listed = ", ".join(map(repr, HEADS))
    raise ValueError(f"model: no head recognised for {name}; pass head= one of {listed}")
