"""Cross-entropy of a linear head whose vocabulary is split over ranks, a chunk of rows at a time.

For a chunk of hidden states h under this rank's slice W_r, with z the logits of the slice:

    1   z = h W_r^T + bias                                 (C, V_r) fp32, scaled and capped
        sent: max z, sum e^(z - max z), z at the label     (3, C) fp64; the last is -inf where another rank has it
        lse over all ranks, in rank order                  loss = lse - z at the label
        G = e^(z - lse) - 1 at the label                   through the cap, where there is one
    2   d h = G W_r, summed over the ranks                 (C, H)
    3   dW_r += G^T h                                      while product 2 is summed

A label that no rank has, other than the ignored -100, makes the loss infinite.
"""

import math

import torch
from torch import Tensor

from alum_kernels.backends.linear_chunks import LinearOptions, Wanted, rows_in_chunk, wide_product
from alum_kernels.backends.soft_cap import finished_logits, uncap_gradients
from alum_kernels.backends.vocabulary_group import VocabularySplit

IGNORED_LABEL = -100
"""Of a row without a label, as in ``torch.nn.functional.cross_entropy``."""


def loss_and_gradients(
    hidden: Tensor,  # (N, H), the same on every rank
    weight: Tensor,  # (V_r, H)
    labels: Tensor,  # (N,) int64 of all classes, the same on every rank
    bias: Tensor | None,  # (V_r,)
    split: VocabularySplit,
    options: LinearOptions,  # of which logit scale, soft cap and the budget of a chunk count
    wanted: Wanted,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The summed loss, and its gradients to hidden, weight and bias where they are wanted; fp32, and fp64 for fp64."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if not hidden.is_cuda:
        hidden, weight = hidden.to(wide), weight.to(wide)
    # between products bf16 also where the inputs are fp16, as in linear_chunks.py
    gradient_dtype = torch.bfloat16 if hidden.dtype == torch.float16 else hidden.dtype
    gradient_weight = weight.to(gradient_dtype)
    grad_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if wanted.hidden else None
    grad_weight = torch.zeros(weight.shape, dtype=wide, device=hidden.device) if wanted.weight else None
    grad_bias = torch.zeros(weight.shape[:1], dtype=wide, device=hidden.device) if wanted.bias else None
    size = rows_in_chunk(hidden.shape[0], max(split.sizes), options, hidden.device, hidden.dtype.itemsize)
    losses = []
    for begin in range(0, hidden.shape[0], size):
        chunk = slice(begin, begin + size)
        products = wide_product(hidden[chunk], weight.T)
        products = products if bias is None else products + bias.to(wide)
        loss, gradient = _rows(products, labels[chunk], split, options)
        losses.append(loss)
        if not wanted.any():
            continue
        narrow = gradient.to(gradient_dtype)
        through = split.summed(wide_product(narrow, gradient_weight)) if wanted.hidden else None
        if wanted.weight:
            wide_product(narrow.T, hidden[chunk].to(gradient_dtype), out=grad_weight, accumulate=True)
        if wanted.bias:
            grad_bias += gradient.sum(0)
        if through is not None:
            grad_hidden[chunk] = through()
    total = torch.stack(losses).sum() if losses else torch.zeros((), dtype=torch.float64, device=hidden.device)
    return total.to(wide), grad_hidden, grad_weight, grad_bias


def _rows(products: Tensor, labels: Tensor, split: VocabularySplit, options: LinearOptions) -> tuple[Tensor, Tensor]:
    """The summed loss of a chunk in fp64, and the gradients to its products with bias, (C, V_r)."""
    scale, cap = options.logit_scale, options.soft_cap_at
    logits = finished_logits(products, scale, cap)
    counted, own = labels != IGNORED_LABEL, labels - split.offset
    here = (own >= 0) & (own < logits.shape[1])
    if logits.shape[1] == 0:
        lowest = torch.full(labels.shape, -math.inf, dtype=torch.float64, device=logits.device)
        largest, total, at_label = lowest, torch.zeros_like(lowest), lowest
    else:
        index = own.clamp(0, logits.shape[1] - 1).unsqueeze(1)
        largest = logits.amax(1)
        above = torch.where(largest == -math.inf, 0, largest)
        total = (logits - above.unsqueeze(1)).exp().sum(1)
        at_label = torch.where(here, logits.gather(1, index).squeeze(1), -math.inf)
    told = torch.stack([largest.double(), total.double(), at_label.double()])
    largest, total, at_label = split.gather(told).unbind(1)
    highest = largest.amax(0)
    lse = highest + (total * (largest - highest).exp()).sum(0).log()
    loss = torch.where(counted, lse - at_label.amax(0), 0).sum()
    gradient = (logits - lse.to(logits.dtype).unsqueeze(1)).exp()
    if logits.shape[1] > 0:
        gradient.scatter_add_(1, index, -here.to(gradient.dtype).unsqueeze(1))
    gradient = torch.where(counted.unsqueeze(1), gradient, 0)
    if cap is None:
        return loss, gradient * scale
    return loss, uncap_gradients(gradient, None, torch.zeros_like(products), products, cap, scale)[0]
