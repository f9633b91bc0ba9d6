"""The arguments of the linear divergences: checked, under autocast, flat; and the weight of each row."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from alum_kernels.backends.linear_chunks import LinearOptions, chunk_budget
from alum_kernels.backends.vocabulary_group import VocabularySplit
from alum_kernels.ops import checks
from alum_kernels.ops.reductions import REDUCTIONS, mask_weight, reduce_rows, row_share
from alum_kernels.ops.split_head import agreed_split, local_head
from alum_kernels.ops.symmetric_kl import GRADIENTS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LINEAR_DIVERGENCES = ("symmetric_kl", "kl")


class LinearCall(NamedTuple):
    """One call, checked. Tensors are as autocast would give them to a linear layer, rows are flat."""

    adv_hidden: Tensor  # (N, H)
    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H), or the slice of this rank
    bias: Tensor | None  # (V,), likewise
    row_mask: Tensor | None  # (N,) weight of each row in the reduced loss, None for equal ones
    leading: torch.Size
    reduction: str
    options: LinearOptions
    split: VocabularySplit | None  # how the classes lie on ranks, None where this one has them all

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.adv_hidden, self.hidden, self.weight, self.bias

    def detached(self) -> tuple[Tensor | None, ...]:
        return tuple(None if tensor is None else tensor.detach() for tensor in self.tensors())

    def row_weight(self) -> Tensor:
        """(N,) weight of each row in the reduced loss; that of the sum for ``reduction="none"``."""
        if self.row_mask is not None:
            return self.row_mask
        return row_share(self.reduction, self.leading, self.hidden).expand(self.hidden.shape[0])

    def reduced(self, rows: Tensor) -> Tensor:
        """The result of the call, of the losses of its rows (N,)."""
        weight = None if self.row_mask is None else self.row_mask.reshape(self.leading)
        return reduce_rows(rows.reshape(self.leading), weight, self.reduction)


def linear_call(
    divergence: str,
    adv_hidden: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    mask: Tensor | None,
    reduction: str,
    gradient: str,
    temperature: float,
    logit_scale: float,
    soft_cap: float | None,
    gather_rows: bool,
    chunk_bytes: int | None,
    group: ProcessGroup | None,
) -> LinearCall:
    """Check the arguments of a linear divergence and make them ready."""
    checks.check_choice("divergence", divergence, LINEAR_DIVERGENCES)
    local = local_head([("adv_hidden", adv_hidden), ("hidden", hidden)], weight, bias, group)
    (adv_hidden, hidden), weight, bias = local.hidden, local.weight, local.bias
    _check_tensors(adv_hidden, hidden, weight, bias, split=local.group is not None)
    checks.check_mask(mask, hidden.shape[:-1], hidden.device)
    checks.check_choice("reduction", reduction, REDUCTIONS)
    checks.check_choice("gradient", gradient, GRADIENTS)
    if checks.check_magnitude("temperature", temperature) == 0:
        raise ValueError("temperature: expected a number > 0, got 0")
    checks.check_magnitude("logit_scale", logit_scale)
    if soft_cap is not None and checks.check_magnitude("soft_cap", soft_cap) == 0:
        raise ValueError("soft_cap: expected a number > 0 or None, got 0")
    check_chunk_bytes(chunk_bytes)
    adv_hidden, hidden, weight, bias = as_autocast(adv_hidden, hidden, weight, bias)
    leading, size = hidden.shape[:-1], hidden.shape[-1]
    row_mask = mask_weight(mask, reduction, leading, hidden.dtype)
    masked = "none" if mask is None else "gather" if gather_rows else "keep"
    options = LinearOptions(divergence, gradient, 1.0 / temperature, logit_scale, soft_cap, masked, chunk_bytes)
    split = None
    if local.group is not None:
        # what decides how many chunks there are and what is summed over the ranks
        differentiated = torch.is_grad_enabled() and (adv_hidden.requires_grad, hidden.requires_grad)
        call = (options, reduction, hidden.dtype, chunk_budget(chunk_bytes, hidden.device), differentiated)
        split = agreed_split(local, [("adv_hidden", adv_hidden), ("hidden", hidden), ("mask", mask)], call)
    return LinearCall(
        adv_hidden.reshape(-1, size),
        hidden.reshape(-1, size),
        weight,
        bias,
        None if row_mask is None else row_mask.reshape(-1),
        leading,
        reduction,
        options,
        split,
    )


def check_head(
    hidden: Tensor, weight: Tensor, others: Sequence[tuple[str, Tensor]] = (), *, split: bool = False
) -> None:
    """A weight (V, H) for hidden states (..., H); it and ``others`` on their device and, without autocast, dtype.

    With ``split`` it is a rank's part of a head and may have no class.
    """
    checks.check_rank("weight", weight, 2, "(V, H)")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight: expected shape (V, {hidden.shape[-1]}) as hidden, got {checks.shape_of(weight)}")
    if (weight.shape[0] == 0 and not split) or weight.shape[1] == 0:
        raise ValueError(f"weight: expected at least one class and one feature, got shape {checks.shape_of(weight)}")
    for name, tensor in (("weight", weight), *others):
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: expected device {hidden.device} as hidden, got {tensor.device}")
        if tensor.dtype != hidden.dtype and not autocast_enabled(hidden.device):
            raise TypeError(
                f"{name}: expected dtype {hidden.dtype} as hidden, got {tensor.dtype} "
                "(under torch.autocast they may differ)"
            )


def _check_tensors(adv_hidden: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, split: bool) -> None:
    for name, tensor in (("adv_hidden", adv_hidden), ("hidden", hidden), ("weight", weight)):
        checks.check_floating(name, tensor)
    if adv_hidden.dim() < 2:
        raise ValueError(f"adv_hidden: expected shape (..., H) with a row dimension, got {checks.shape_of(adv_hidden)}")
    free = autocast_enabled(adv_hidden.device)
    checks.check_like("hidden", hidden, "adv_hidden", adv_hidden, dtype=not free)
    if bias is None:
        return check_head(hidden, weight, split=split)
    checks.check_floating("bias", bias)
    check_head(hidden, weight, [("bias", bias)], split=split)
    if tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {checks.shape_of(bias)}")


def check_chunk_bytes(chunk_bytes: int | None) -> None:
    if chunk_bytes is not None and (isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int)):
        raise TypeError(f"chunk_bytes: expected an int or None, got {type(chunk_bytes).__name__}")
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes: expected a number > 0, got {chunk_bytes}")


def autocast_enabled(device: torch.device) -> bool:
    """Whether an autocast for the device's type is on; there is none for some, such as meta."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """The products choose their own dtype: within this an autocast around the call does not choose it again."""
    return torch.autocast(device.type, enabled=False) if autocast_enabled(device) else nullcontext()


def as_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a linear layer's autocast does to its arguments: fp32 and half precision become the autocast's dtype."""
    device = tensors[0].device
    if not autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
