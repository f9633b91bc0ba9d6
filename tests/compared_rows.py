"""Which logits of two passes a task compares, by the task's definition, and the divergence between them.

A head's logits are a list of (N, V) tensors, for rows of answers have as many classes as their sequence has tokens.
"""

from typing import Any

import torch
from torch import Tensor

from alum_kernels.backends.reference import symmetric_kl as reference

Rows = list[Tensor]

LANGUAGE_MODELS = ("masked_lm", "causal_lm", "seq2seq")


def compared(task: str, outputs: Any, batch: dict[str, Tensor], positions: str = "labelled") -> list[Rows]:
    """The compared logits of each head of ``task``, in the words of ``tiny_families.TASKS``."""
    if task == "spans":
        lengths = batch["attention_mask"].sum(1).tolist()
        sides = (outputs.start_logits, outputs.end_logits)
        return [[side[sample : sample + 1, :length] for sample, length in enumerate(lengths)] for side in sides]
    logits = outputs if isinstance(outputs, Tensor) else outputs.logits
    if task in ("classification", "choice"):
        return [[logits]]
    if task == "regression":
        return [[logits.reshape(-1, 1)]]
    if positions == "all":
        return [[logits[batch["attention_mask"] == 1]]]
    labels = batch["labels"]
    if task == "causal_lm":
        return [[logits[:, :-1][labels[:, 1:] != -100]]]
    return [[logits[labels != -100]]]


def divergences(
    task: str,
    adv: list[Rows],
    clean: list[Rows],
    *,
    divergence: str,
    gradient: str = "full",
    temperature: float = 1.0,
) -> list[Tensor]:
    """(N,) divergence of the rows of each head, which autograd differentiates as the convention says."""

    def rows(a: Tensor, b: Tensor) -> Tensor:
        if task == "regression":
            return ((a - (b.detach() if gradient == "detach_clean" else b)) ** 2).sum(-1)
        return divergence_rows(a / temperature, b / temperature, divergence, gradient)

    return [
        torch.cat([rows(a, b) for a, b in zip(own, other, strict=True)]) for own, other in zip(adv, clean, strict=True)
    ]


def divergence_rows(a: Tensor, b: Tensor, divergence: str, gradient: str = "full") -> Tensor:
    """(N,) divergence of adversarial and clean logits (N, V).

    The formulas are the reference's, since textbook ones lose too many digits at perturbations of 1e-5. With
    ``detach_targets`` each side is pulled towards the other one's prediction, which is a constant.
    """

    def formula(name: str, a: Tensor, b: Tensor) -> Tensor:
        return reference.loss(a, b, None, divergence=name, inv_temperature=1.0)[0]

    if gradient == "detach_targets" and divergence == "symmetric_kl":
        return formula("kl", a, b.detach()) + formula("kl", b, a.detach())
    if gradient == "detach_clean" or (gradient == "detach_targets" and divergence == "kl"):
        return formula(divergence, a, b.detach())
    return formula(divergence, a, b)


def sample_losses(task: str, outputs: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(B,) losses of the samples, means over what is labelled in each, and how many labels each has."""
    if task == "regression":
        losses = (outputs.logits.flatten() - batch["labels"]) ** 2
        return losses, torch.ones_like(losses)
    if task == "spans":
        lengths = batch["attention_mask"].sum(1).tolist()
        sides = ((outputs.start_logits, batch["start_positions"]), (outputs.end_logits, batch["end_positions"]))
        ends = [
            [_surprise(logits[b, :length], labels[b]) for b, length in enumerate(lengths)] for logits, labels in sides
        ]
        losses = torch.stack([torch.stack(side) for side in ends]).mean(0)
        inside = [(labels >= 0) & (labels < batch["attention_mask"].sum(1)) for _, labels in sides]
        return losses, (inside[0] | inside[1]).double()
    logits = outputs if isinstance(outputs, Tensor) else outputs.logits
    labels = batch["labels"]
    if task in ("classification", "choice"):
        return torch.stack([_surprise(*pair) for pair in zip(logits, labels, strict=True)]), (labels >= 0).double()
    if task == "causal_lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = []
    for own, wanted in zip(logits, labels, strict=True):
        places = (wanted != -100).nonzero().flatten().tolist()
        total = sum((_surprise(own[place], wanted[place]) for place in places), start=0 * own.sum())
        losses.append(total / max(len(places), 1))
    return torch.stack(losses), (labels != -100).sum(1).double()


def _surprise(logits: Tensor, label: Tensor) -> Tensor:
    """Minus the logarithm of a label's probability; 0 where the label is none of the classes."""
    if not 0 <= label < len(logits):
        return 0 * logits.sum()
    return logits.logsumexp(0) - logits[label]
