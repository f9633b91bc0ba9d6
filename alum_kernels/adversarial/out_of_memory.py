"""What to do about a step that an allocator refuses: the batch, and what would need less, in the error's message."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alum_kernels.adversarial.config import AdversarialConfig
from alum_kernels.adversarial.model_state import device_of, unwrap
from alum_kernels.backends.linear_chunks import CHUNK_BYTES_VARIABLE, chunk_budget

_BEGINNING = "out of memory in a step over a batch of "

ADVISED = "What needs less"
"""What a message with advice has in it."""

REFUSALS = (torch.OutOfMemoryError, MemoryError, RuntimeError)
"""Types of an allocator's refusals, the more special first: CUDA's, the host's and PyTorch's of the CPU."""

LEAST_CHUNK_BYTES = 1 << 20
"""No lower budget is advised: chunks of a few rows make slow products."""


def refused_memory(error: BaseException) -> bool:
    """Whether an allocator refused: PyTorch's of the CPU has no exception type of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextmanager
def memory_advice(
    batch: Mapping[str, Any], config: AdversarialConfig, model: nn.Module, *, chunked: bool
) -> Iterator[None]:
    """Raise an allocator's refusal within the context again, of the same type, with what would need less memory.

    A library's own type may not be made of a message: it becomes the one of ``REFUSALS`` that it is a kind of. The
    message ends with the allocator's own, by which others know it; the original error is the cause.

    Args:
        batch: arguments of the model.
        config: the method.
        model: which runs over it.
        chunked: the model is trained without its logits, in chunks of them.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not refused_memory(error) or str(error).startswith(_BEGINNING):
            raise
        advice = _advice(batch, config, device_of(unwrap(model)), chunked)
        kind = next(kind for kind in REFUSALS if isinstance(error, kind))
        raise kind(f"{_BEGINNING}{advice}. {error}") from error


def _advice(batch: Mapping[str, Any], config: AdversarialConfig, device: torch.device, chunked: bool) -> str:
    cures = []
    if chunked:
        budget = chunk_budget(None, device)
        lower = max(budget // 4, LEAST_CHUNK_BYTES)
        now = f"chunk_bytes is {budget} now"
        cures.append(f"{CHUNK_BYTES_VARIABLE}={lower} ({now})" if lower < budget else f"no smaller chunks ({now})")
    if config.memory != "low" and _may_be_low(config):
        cures.append("AdversarialConfig(memory='low'), which holds one graph at a time")
    cures.append("fewer samples in a batch and as many more gradient accumulation steps")
    return f"{_shape(batch)} on {device}. {ADVISED}: {'; '.join(cures)}"


def _may_be_low(config: AdversarialConfig) -> bool:
    try:
        config.replace(memory="low")
    except ValueError:
        return False
    return True


def _shape(batch: Mapping[str, Any]) -> str:
    """The batch's samples and tokens."""
    for name, hidden in (("input_ids", 0), ("inputs_embeds", 1)):
        value = batch.get(name)
        if isinstance(value, Tensor) and value.dim() - hidden in (2, 3):
            shape = tuple(value.shape[: value.dim() - hidden])
            return f"({'B, S' if len(shape) == 2 else 'B, choices, S'}) = {shape}"
    shapes = [f"{name} {tuple(value.shape)}" for name, value in batch.items() if isinstance(value, Tensor)]
    return ", ".join(shapes) or "no tensors"
