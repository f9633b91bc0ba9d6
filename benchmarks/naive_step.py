"""The baseline: an adversarial training step in plain PyTorch, as people write it, but correct.

After the official ALUM code (MT-DNN's ``SmartPerturbation``), with its faults mended: noise goes to the *word*
embeddings, so that position embeddings are added once; delta is clipped to epsilon, not rescaled to norm 1; the clean
pass's logits are the targets. Each pass is a forward of the model on ``inputs_embeds``; noise is ``torch.randn_like``;
the loss is two-sided ``F.kl_div``; dropout is drawn anew in each pass; padding is perturbed like the rest.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .eager_kl import eager_symmetric_kl

IGNORED_LABEL = -100
Rows = Callable[[Tensor, Tensor], Tensor]
"""(logits, labels) to the (N, V) rows that are compared."""


def class_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (B, V) of a classifier, as they are."""
    return logits


def all_positions(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, S, V) -> (B S, V)."""
    return logits.flatten(0, 1)


def labelled_positions(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, S, V) -> (labelled, V)."""
    return logits[labels != IGNORED_LABEL]


def labelled_successors(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, S, V) -> (labelled, V) of a causal LM, whose positions predict the label after them."""
    return logits[:, :-1][labels[:, 1:] != IGNORED_LABEL]


def naive_adversarial_step(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    rows: Rows,
    *,
    alpha: float,
    std: float,
    step_size: float,
    epsilon: float,
) -> Tensor:
    """Clean pass, one ascent step, adversarial pass, backward; gradients are in ``.grad``. Returns the loss."""
    labels, attention_mask = batch["labels"], batch["attention_mask"]
    outputs = model(**batch)
    clean = rows(outputs.logits, labels)
    embeds = model.get_input_embeddings()(batch["input_ids"])

    def adversarial_rows(delta: Tensor, around: Tensor) -> Tensor:
        return rows(model(inputs_embeds=around + delta, attention_mask=attention_mask).logits, labels)

    delta = (std * torch.randn_like(embeds)).requires_grad_()
    inner = eager_symmetric_kl(adversarial_rows(delta, embeds.detach()), clean.detach())
    (grad,) = torch.autograd.grad(inner, delta)
    delta = (delta.detach() + step_size * grad).clamp(-epsilon, epsilon)

    loss = outputs.loss + alpha * eager_symmetric_kl(adversarial_rows(delta, embeds), clean)
    loss.backward()
    return loss.detach()


def standard_step(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Forward and backward of the task alone. Returns the loss."""
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def smart_pytorch_step(model: nn.Module, batch: Mapping[str, Tensor], rows: Rows, *, alpha: float) -> Tensor | None:
    """The same step through the package smart-pytorch. Returns the loss.

    Its ``SMARTLoss`` has its own constants, divides delta by its norm instead of clipping it, and detaches targets.
    """
    from smart_pytorch import SMARTLoss, sym_kl_loss

    labels, attention_mask = batch["labels"], batch["attention_mask"]
    outputs = model(**batch)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    regulariser = SMARTLoss(
        eval_fn=lambda x: rows(model(inputs_embeds=x, attention_mask=attention_mask).logits, labels),
        loss_fn=sym_kl_loss,
    )
    clean = rows(outputs.logits, labels)
    loss = outputs.loss + alpha * regulariser(embeds, clean) / len(clean)
    loss.backward()
    return loss.detach()
