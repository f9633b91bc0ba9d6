"""What a model predicts, and how its clean and perturbed predictions are compared."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alum_kernels.ops.checks import check_choice
from alum_kernels.ops.squared_error import squared_error
from alum_kernels.ops.symmetric_kl import js, kl, squared_hellinger, symmetric_kl, symmetric_kl_grad

HEADS = ("classification", "regression", "masked_lm", "causal_lm", "pretraining")
TOKEN_HEADS = ("masked_lm", "causal_lm")
"""Heads that predict a token at each position."""

POSITIONS = ("labelled", "all")

LABEL_KEYS = ("labels", "label", "label_ids", "shift_labels", "next_sentence_label", "num_items_in_batch")
"""Entries of a batch that only the task's loss reads; the perturbed passes go without them."""

IGNORED_LABEL = -100

_DIVERGENCES = {"symmetric_kl": symmetric_kl, "kl": kl, "js": js, "squared_hellinger": squared_hellinger}


@dataclass(frozen=True)
class Head:
    """How two predictions of one head are compared.

    ``classification`` compares (B, V) logits row by row, ``regression`` squared differences, ``masked_lm`` and
    ``causal_lm`` (B, S, V) logits at the positions that predict a label. ``pretraining`` is BERT's two heads: masked
    tokens, and whether two segments belong together; their divergences are added.

    Attributes:
        name: one of ``HEADS``.
        field: where a model's output has the logits.
    """

    name: str
    field: str = "logits"

    def __post_init__(self) -> None:
        check_choice("head", self.name, HEADS)

    @property
    def parts(self) -> tuple["Head", ...]:
        """The heads that are compared one by one."""
        if self.name == "pretraining":
            return Head("masked_lm", "prediction_logits"), Head("classification", "seq_relationship_logits")
        return (self,)

    @property
    def tokens(self) -> "Head | None":
        """The part that predicts a token at each position, if there is one."""
        return next((part for part in self.parts if part.name in TOKEN_HEADS), None)

    def logits(self, outputs: Any) -> Tensor:
        """The predictions in what a model returned: an object or mapping with ``logits``, or a tensor."""
        if isinstance(outputs, Tensor):
            found = outputs
        elif isinstance(outputs, Mapping):
            found = outputs.get(self.field)
        else:
            found = getattr(outputs, self.field, None)
        if not isinstance(found, Tensor):
            raise TypeError(f"model: expected a tensor or an output with {self.field!r}, got {type(outputs).__name__}")
        expected = 3 if self.name in TOKEN_HEADS else 2
        if found.dim() != expected:
            raise ValueError(f"model: expected {expected}-d logits for a {self.name} head, got {tuple(found.shape)}")
        return found

    def labels(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, S) labels of the token that each position predicts, ``IGNORED_LABEL`` where there is none."""
        labels, shifted = batch.get("labels"), batch.get("shift_labels")
        if self.name == "causal_lm" and isinstance(shifted, Tensor):
            return shifted
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            raise ValueError(
                f"batch: expected 'labels' (B, S) for a {self.name} head, got {', '.join(batch) or 'an empty batch'}"
            )
        if self.name == "masked_lm":
            return labels
        shifted = torch.full_like(labels, IGNORED_LABEL)
        shifted[:, :-1] = labels[:, 1:]
        return shifted

    def row_mask(self, batch: Mapping[str, Any], positions: str = "labelled") -> Tensor | None:
        """Rows that are compared, None for all: of a token head the labelled positions, or those not of padding."""
        if self.name not in TOKEN_HEADS:
            return None
        if positions == "labelled":
            return self.labels(batch) != IGNORED_LABEL
        mask = batch.get("attention_mask")
        return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None

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
        reduction: str = "mean",
    ) -> Tensor:
        """Mean (or sum) over the compared rows, differentiable."""
        if self.name == "regression":
            convention = "detach_clean" if gradient == "detach_clean" else "full"
            return squared_error(adv_logits, logits, mask=mask, gradient=convention, reduction=reduction)
        return _DIVERGENCES[divergence](
            adv_logits,
            logits,
            mask=mask,
            reduction=reduction,
            gradient=gradient,
            temperature=temperature,
            backend=backend,
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
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return Head("causal_lm")
    if name.endswith("BertForPreTraining"):
        return Head("pretraining")
    if name.endswith("ForSequenceClassification"):
        problem = getattr(config, "problem_type", None)
        if problem == "multi_label_classification":
            raise ValueError(f"model: {name} with problem_type 'multi_label_classification' has no softmax to compare")
        regression = problem == "regression" or (problem is None and getattr(config, "num_labels", None) == 1)
        return Head("regression" if regression else "classification")
    listed = ", ".join(map(repr, HEADS))
    raise ValueError(f"model: no head recognised for {name}; pass head= one of {listed}")
