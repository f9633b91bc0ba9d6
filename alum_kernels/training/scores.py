"""How good a model is on held-out data: its loss, and the share that is right or the correlation of its scores."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from alum_kernels.adversarial.labels import IGNORED_LABEL
from alum_kernels.training.batches import Batch
from alum_kernels.training.precision import Precision
from alum_kernels.training.settings import CAUSAL_LM, LABELLED, REGRESSION


@torch.no_grad()
def scores(model: nn.Module, batches: Iterable[Batch], task: str, precision: Precision) -> dict[str, float]:
    """Figures of the model in evaluation mode, which it leaves again.

    Returns:
        ``loss``, the mean over the samples or the labelled tokens; ``accuracy`` of these, and of language models
        ``perplexity``; of a regression ``pearson``, 0 where either side is constant.

    Raises:
        ValueError: there are no samples.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    predicted, expected, losses, items = [], [], [], []
    for batch in batches:
        placed = {name: tensor.to(device) for name, tensor in batch.items()}
        with precision.autocast():
            output = model(**placed)
        logits, labels = output.logits.float(), placed["labels"]
        if task == CAUSAL_LM:
            logits, labels = logits[:, :-1], labels[:, 1:]
        counted = labels != IGNORED_LABEL if task not in LABELLED else torch.ones_like(labels, dtype=torch.bool)
        if not bool(counted.any()):
            continue
        predicted.append((logits.squeeze(-1) if task == REGRESSION else logits.argmax(-1))[counted])
        expected.append(labels[counted])
        losses.append(output.loss.double())
        items.append(int(counted.sum()))
    model.train(training)
    if not items:
        raise ValueError("batches: expected at least one sample with a label, got none")
    weights = torch.tensor(items, dtype=torch.float64, device=device)
    loss = float((torch.stack(losses) * weights).sum() / weights.sum())
    one, other = torch.cat(predicted), torch.cat(expected)
    if task == REGRESSION:
        return {"loss": loss, "pearson": pearson(one, other)}
    figures = {"loss": loss, "accuracy": float((one == other).double().mean())}
    return figures if task in LABELLED else {**figures, "perplexity": math.exp(min(loss, 700.0))}


def pearson(one: Tensor, other: Tensor) -> float:
    """Correlation of two (N,) tensors in float64; 0 where either is constant.

    Example:
        >>> round(pearson(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 4.0, 8.0])), 12)
        1.0
    """
    a, b = (side.double() - side.double().mean() for side in (one, other))
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else 0.0
