"""Gradients of a pass to the perturbed tensors alone, which no reentrant checkpoint can give."""

from collections.abc import Sequence

import torch
from torch import Tensor


def input_gradients(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    upstream: Tensor | Sequence[Tensor] | None,
    **options: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``upstream`` . outputs to ``inputs``, None where there is none; no parameter gets one.

    Args:
        outputs, inputs, upstream: as ``torch.autograd.grad`` takes them; None stands for the 1 of a scalar.
        options: its ``create_graph`` and ``retain_graph``.

    Raises:
        ValueError: the pass has layers that are checkpointed with ``use_reentrant=True``. They compute the gradients of
            their parameters whenever they are run through, so torch lets them serve whole backwards only.
    """
    try:
        return torch.autograd.grad(outputs, inputs, upstream, allow_unused=True, **options)
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        raise ValueError(
            "model: expected layers checkpointed with use_reentrant=False, got use_reentrant=True, which cannot "
            "differentiate to the perturbed embeddings alone; "
            "model.gradient_checkpointing_enable({'use_reentrant': False}) changes it, and so does "
            "gradient_checkpointing_kwargs={'use_reentrant': False} of TrainingArguments"
        ) from error
