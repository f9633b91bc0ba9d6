"""``linear_symmetric_kl`` and ``linear_kl``: divergences between the predictions of two hidden states under one head.

At most a chunk of logits is held at a time: rows go through three products and one row kernel, chunk by chunk, which
``alum_kernels/backends/linear_chunks.py`` describes. The forward forms the gradients; the backward scales them,
out of place, by an upstream factor that the host never looks at. With ``reduction="none"`` the upstream factors of the
rows are not known in the forward, and the backward goes through the chunks again.

Where the vocabulary is split over ranks the same happens around ``alum_kernels/backends/split_vocabulary.py``: not in
the registered op, whose schema holds no process group, so that the call runs eagerly.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alum_kernels.backends.linear_chunks import LinearDivergence, LinearOptions, Wanted
from alum_kernels.backends.reference import linear_symmetric_kl as reference
from alum_kernels.backends.split_vocabulary import SplitRows
from alum_kernels.backends.vocabulary_group import VocabularySplit
from alum_kernels.ops.dispatch import LIBRARY, BackendUnavailableError, choose, implementation
from alum_kernels.ops.linear_arguments import LinearCall, linear_call, without_autocast
from alum_kernels.ops.split_head import EAGER, is_split

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LIBRARY.define(
    "linear_symmetric_kl(Tensor adv_hidden, Tensor hidden, Tensor weight, Tensor? bias, Tensor? row_weight,"
    " Tensor? clean_products, str divergence, str gradient, float inv_temperature, float logit_scale,"
    " float? soft_cap, str masked_rows, int? chunk_bytes, bool[4] wanted, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _linear(
    adv_hidden: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_weight: Tensor | None,
    clean_products: Tensor | None,
    divergence: str,
    gradient: str,
    inv_temperature: float,
    logit_scale: float,
    soft_cap: float | None,
    masked_rows: str,
    chunk_bytes: int | None,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = LinearOptions(divergence, gradient, inv_temperature, logit_scale, soft_cap, masked_rows, chunk_bytes)
    kernel = implementation("linear_symmetric_kl", backend)
    return _in_chunks(kernel, adv_hidden, hidden, weight, bias, row_weight, clean_products, options, wanted)


def _in_chunks(
    kernel: ModuleType | SplitRows,
    adv_hidden: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_weight: Tensor | None,
    clean_products: Tensor | None,
    options: LinearOptions,
    wanted: Sequence[bool],
    split: VocabularySplit | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad(), without_autocast(hidden.device):
        result = LinearDivergence(
            kernel, adv_hidden, hidden, weight, bias, row_weight, clean_products, options, Wanted(*wanted), split=split
        ).run()
    none = torch.empty(0, dtype=torch.float32, device=hidden.device)
    sides = (result.adv_hidden, result.hidden, result.weight, result.bias)
    return result.rows, *(none.clone() if side is None else side for side in sides)


def rows_and_gradients(
    tensors: Sequence[Tensor | None],
    row_weight: Tensor | None,
    clean_products: Tensor | None,
    options: LinearOptions,
    wanted: Sequence[bool],
    served_by: str | VocabularySplit,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses (N,) and the wanted gradients of adv_hidden, hidden, weight, bias: from a backend, or over the ranks."""
    if isinstance(served_by, str):
        return torch.ops.alum_kernels.linear_symmetric_kl(
            *tensors, row_weight, clean_products, *options, wanted, served_by
        )
    kernel = SplitRows(served_by.gather, served_by.rank)
    return _in_chunks(kernel, *tensors, row_weight, clean_products, options, wanted, served_by)


def served(call: LinearCall, backend: str | None) -> str | VocabularySplit:
    """The backend of a call, or the ranks that its classes are split over."""
    if call.split is None:
        return choose("linear_symmetric_kl", backend, call.hidden, call.options.divergence)
    if backend is not None:
        raise BackendUnavailableError(
            f"backend={backend!r} cannot serve linear_symmetric_kl over a split vocabulary: "
            "its rows are plain PyTorch on every device, and only backend=None takes them"
        )
    return call.split


LIBRARY.impl("linear_symmetric_kl", _linear, "CompositeExplicitAutograd")


@torch.library.register_fake("alum_kernels::linear_symmetric_kl", lib=LIBRARY)
def _linear_fake(
    adv_hidden,
    hidden,
    weight,
    bias,
    row_weight,
    clean_products,
    divergence,
    gradient,
    inv_temperature,
    logit_scale,
    soft_cap,
    masked_rows,
    chunk_bytes,
    wanted,
    backend,
):
    shapes = (adv_hidden.shape, hidden.shape, weight.shape, weight.shape[:1])
    rows = hidden.new_empty(hidden.shape[:1], dtype=torch.float32)
    return rows, *(
        hidden.new_empty(shape if want else (0,), dtype=torch.float32)
        for shape, want in zip(shapes, wanted, strict=True)
    )


class _ScaleOnce(torch.autograd.Function):
    """``upstream`` times stored fp32 gradients, each rounded once to its input's dtype; once more raises.

    The stored ones stay as they are, for a second backward. The inputs, and what else the gradients were formed from,
    take part so that a second derivative is asked of this function, which does not have it, and not silently of nobody.
    """

    @staticmethod
    def forward(ctx, upstream, gradients, *inputs):
        return tuple((gradient * upstream).to(x.dtype) for gradient, x in zip(gradients, inputs, strict=False))

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "linear_symmetric_kl, linear_kl: second derivatives are not implemented by the fused kernels; "
            "pass a whole weight and backend='reference', which has them"
        )


def _wanted(ctx, gradient: str) -> list[bool]:
    """Which of adv_hidden, hidden, weight and bias receive a gradient."""
    adv_hidden, hidden, weight, bias = ctx.needs_input_grad[:4]
    return [adv_hidden, hidden and gradient != "detach_clean", weight, bias]


def _chosen(tensors: Sequence[Tensor], wanted: list[bool]) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor, want in zip(tensors, wanted, strict=True) if want)


class _Reduced(torch.autograd.Function):
    """The sum of row_weight times the loss of each row, a scalar."""

    @staticmethod
    def forward(ctx, adv_hidden, hidden, weight, bias, row_weight, options, served_by):
        ctx.wanted = _wanted(ctx, options.gradient)
        tensors = adv_hidden, hidden, weight, bias
        rows, *gradients = rows_and_gradients(tensors, row_weight, None, options, ctx.wanted, served_by)
        inputs = _chosen(tensors, ctx.wanted)
        ctx.save_for_backward(*_chosen(gradients, ctx.wanted), *inputs)
        return (rows * row_weight).sum()

    @staticmethod
    def backward(ctx, upstream):
        # read once: hooks on saved tensors, such as a checkpoint's, unpack at every reading
        saved, count = ctx.saved_tensors, sum(ctx.wanted)
        scaled = iter(_ScaleOnce.apply(upstream, saved[:count], *saved[count:]))
        return *(next(scaled) if want else None for want in ctx.wanted), None, None, None


class _Rows(torch.autograd.Function):
    """The loss of each row, (N,)."""

    @staticmethod
    def forward(ctx, adv_hidden, hidden, weight, bias, row_weight, options, served_by):
        tensors = adv_hidden, hidden, weight, bias
        rows, *_ = rows_and_gradients(tensors, row_weight, None, options, [False] * 4, served_by)
        ctx.save_for_backward(*tensors, row_weight)
        ctx.options, ctx.served_by = options, served_by
        return rows

    @staticmethod
    def backward(ctx, grad_rows):
        *inputs, row_weight = ctx.saved_tensors
        wanted = _wanted(ctx, ctx.options.gradient)
        if row_weight is not None:
            grad_rows = torch.where(row_weight != 0, grad_rows, 0)
        _, *gradients = rows_and_gradients(inputs, grad_rows, None, ctx.options, wanted, ctx.served_by)
        one = torch.ones_like(grad_rows.sum())
        scaled = iter(_ScaleOnce.apply(one, _chosen(gradients, wanted), *_chosen(inputs, wanted), grad_rows))
        return *(next(scaled) if want else None for want in wanted), None, None, None


def _divergence(
    divergence: str,
    adv_hidden: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    group: ProcessGroup | None,
    **arguments: Any,
) -> Tensor:
    compute = _divergence_over_ranks if is_split(weight, group) else _divergence_of
    return compute(divergence, adv_hidden, hidden, weight, bias, group=group, **arguments)


def _divergence_of(*operands: Any, backend: str | None, **arguments: Any) -> Tensor:
    call = linear_call(*operands, **arguments)
    chosen = served(call, backend)
    if chosen == "reference":
        with without_autocast(call.hidden.device):
            return call.reduced(reference.rows(*call.tensors(), call.row_mask, call.options))
    # without a graph nothing will ask for gradients, whatever the tensors require
    inputs = call.tensors() if torch.is_grad_enabled() else call.detached()
    if call.reduction == "none":
        return _Rows.apply(*inputs, call.row_mask, call.options, chosen).reshape(call.leading)
    return _Reduced.apply(*inputs, call.row_weight(), call.options, chosen)


_divergence_over_ranks = torch.compiler.disable(_divergence_of, reason=f"linear_symmetric_kl, linear_kl: {EAGER}")


def linear_symmetric_kl(
    adv_hidden: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    gradient: str = "full",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    gather_rows: bool = True,
    chunk_bytes: int | None = None,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """:func:`alum_kernels.symmetric_kl` of the logits that a linear head makes of two hidden states.

    Equal to ``symmetric_kl(head(adv_hidden), head(hidden))`` with ``head(h) = cap tanh(logit_scale (h W^T + bias) /
    cap)``, without the tanh if ``soft_cap`` is None. But it holds at most ``chunk_bytes`` of logits at a time and keeps
    the digits that two rounded logits lose: it forms their difference from that of the hidden states (fp32), or from
    fp32 logits of half-precision products. Gradients reach both hidden states, the weight and the bias.
    fp32 products are as exact as ``torch.backends.cuda.matmul`` allows: with TF32 they keep three digits.

    Args:
        adv_hidden: (..., H) fp32, bf16, fp16 or fp64 (fp64 on the reference backend), at least one row dimension.
        hidden: the clean side, same shape, dtype and device.
        weight: (V, H) of the head, such as ``lm_head.weight``, tied or not; same dtype, except under autocast, which
            casts all of them as it does for a linear layer.
        bias: (V,) or None.
        mask: (...) bool or integers 0 and 1; rows where it is 0 count nowhere, whatever they hold.
        reduction, gradient, temperature: as in :func:`alum_kernels.symmetric_kl`. ``"none"`` goes through the chunks
            twice, once in the backward.
        logit_scale: factor on the logits, bias included.
        soft_cap: bound of soft-capped logits.
        gather_rows: leave masked rows out of the products. On CUDA the host then waits for their number; False sends
            them through, as a captured CUDA graph needs.
        chunk_bytes: memory for a chunk of logits and their gradients; None takes the environment variable
            ``ALUM_LINEAR_CHUNK_BYTES`` or, without it, 64 MiB on the CPU and 1 GiB on CUDA. The same chunks (and CPU
            threads) give the same bits.
        backend: ``"reference"`` (which does hold the logits), ``"native"`` or ``"triton"``; None picks the fastest that
            can serve.
        group: ranks that split the vocabulary: ``weight`` is then the slice (V_r, H) of this one, in rank order and of
            any size, ``bias`` its (V_r,); hidden states and mask are the same on every rank, to the bit, or the call
            raises. Every rank gets the whole loss and hidden gradients, and the gradients of its slice. A DTensor
            weight with placement Shard(0), as ``parallelize_module`` makes it, needs no group and keeps its placement
            in the gradient; bias likewise. Rows are then plain PyTorch (in fp64 too), and ``torch.compile`` leaves the
            call out of its graph. The host waits once for the sizes of the slices, unless the hidden states are
            DTensors as well.

    Returns:
        fp32 (fp64 for fp64 inputs): a scalar, or (...) for ``reduction="none"``. No DTensor.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.
        BackendUnavailableError: ``backend`` cannot serve the call.
        RuntimeError: differentiated twice on a backend other than the reference.

    Source: the regulariser of Liu et al., arXiv:2004.08994; logits in chunks after Wijmans et al., arXiv:2411.09009.

    Example:
        >>> import torch
        >>> from alum_kernels import linear_symmetric_kl, symmetric_kl
        >>> hidden, weight = torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> adv_hidden = hidden + torch.tensor([[1e-3, 0.0]])
        >>> fused = linear_symmetric_kl(adv_hidden, hidden, weight)
        >>> torch.allclose(fused, symmetric_kl(adv_hidden @ weight.T, hidden @ weight.T), rtol=1e-3)
        True
    """
    return _divergence(
        "symmetric_kl",
        adv_hidden,
        hidden,
        weight,
        bias,
        mask=mask,
        reduction=reduction,
        gradient=gradient,
        temperature=temperature,
        logit_scale=logit_scale,
        soft_cap=soft_cap,
        gather_rows=gather_rows,
        chunk_bytes=chunk_bytes,
        backend=backend,
        group=group,
    )


def linear_kl(
    adv_hidden: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    gradient: str = "full",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    gather_rows: bool = True,
    chunk_bytes: int | None = None,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """:func:`alum_kernels.kl` of the logits of a linear head; arguments as :func:`linear_symmetric_kl`.

    Source: virtual adversarial training, Miyato et al., arXiv:1704.03976 (equation 5).
    """
    return _divergence(
        "kl",
        adv_hidden,
        hidden,
        weight,
        bias,
        mask=mask,
        reduction=reduction,
        gradient=gradient,
        temperature=temperature,
        logit_scale=logit_scale,
        soft_cap=soft_cap,
        gather_rows=gather_rows,
        chunk_bytes=chunk_bytes,
        backend=backend,
        group=group,
    )
