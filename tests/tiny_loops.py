"""Plain loops over the tiny models, whose gradients every integration has to leave."""

import tiny_models
import torch
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective

FAR = AdversarialConfig(alpha=5.0, std=0.1, step_size=0.2, epsilon=0.2, normalize="linf", steps=2)
"""So far that bf16 keeps the digits of a difference."""

APART = {None: (1e-10, 1e-6), torch.bfloat16: (2e-4, 1e-3), torch.float16: (4e-6, 3e-4)}
"""One minus the cosine of two gradients in a precision, and the difference of their lengths, relative: about ten times
the most that the rounding of partial sums made of them."""

FROM_FP32 = {torch.bfloat16: (2e-2, 5e-2), torch.float16: (5e-4, 1e-2)}
"""The same between one in a precision and one in fp32."""


def rows_of(batch: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """The batch in micro-batches of ``size`` samples, in order."""
    count = len(batch["labels"])
    return [{key: value[at : at + size] for key, value in batch.items()} for at in range(0, count, size)]


def plain_gradients(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    config: AdversarialConfig,
    max_norm: float | None = None,
    *,
    autocast: torch.dtype | None = None,
) -> list[Tensor]:
    """Gradients of each optimizer step (one a batch) of SGD with a rate of 0.1, clipped if a norm is given.

    Under autocast if a precision is given, with a scaler in fp16.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=autocast == torch.float16)
    objective = AdversarialObjective(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if config.proximal > 0:
        objective.follow(optimizer)
    gradients = []
    for step, batch in enumerate(batches):
        objective.set_progress(step, len(batches))
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            objective.backward(batch, backward=lambda loss: scaler.scale(loss).backward())
        scaler.unscale_(optimizer)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        gradients.append(tiny_models.Gradients.of(model).flat())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return gradients


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Gradients of step after step, equal but for the order of float64 sums."""
    assert len(found) == len(expected)
    for own, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-8, atol=1e-12)


def assert_alike(found: list[Tensor], expected: list[Tensor], limits: tuple[float, float], name: str = "") -> None:
    """Gradients of step after step that are apart by no more than the limits: one minus cosine, and relative length."""
    assert len(found) == len(expected) > 0
    for step, (own, theirs) in enumerate(zip(found, expected, strict=True)):
        assert own.isfinite().all(), name
        own, theirs = own.double(), theirs.double()
        apart = float(1 - torch.cosine_similarity(own, theirs, 0)), abs(float(own.norm() / theirs.norm()) - 1)
        assert all(figure <= limit for figure, limit in zip(apart, limits, strict=True)), (name, step, apart)


def watched(layer: nn.Module) -> list[torch.dtype]:
    """In what precision a layer's passes will have run, in order."""
    seen: list[torch.dtype] = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    return seen
