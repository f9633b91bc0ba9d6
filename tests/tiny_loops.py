"""Plain loops over the tiny models, whose gradients every integration has to leave."""

import tiny_models
import torch
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective


def rows_of(batch: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """The batch in micro-batches of ``size`` samples, in order."""
    count = len(batch["labels"])
    return [{key: value[at : at + size] for key, value in batch.items()} for at in range(0, count, size)]


def plain_gradients(
    model: nn.Module, batches: list[dict[str, Tensor]], config: AdversarialConfig, max_norm: float | None = None
) -> list[Tensor]:
    """Gradients of each optimizer step (one a batch) of SGD with a rate of 0.1, clipped if a norm is given."""
    objective = AdversarialObjective(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if config.proximal > 0:
        objective.follow(optimizer)
    gradients = []
    for step, batch in enumerate(batches):
        objective.set_progress(step, len(batches))
        objective.backward(batch)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        gradients.append(tiny_models.Gradients.of(model).flat())
        optimizer.step()
        optimizer.zero_grad()
    return gradients


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Gradients of step after step, equal but for the order of float64 sums."""
    assert len(found) == len(expected)
    for own, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-8, atol=1e-12)
