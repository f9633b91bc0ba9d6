"""The linear divergence, a chunk of rows at a time, around the row kernel of a backend.

For C rows of hidden states h and h_adv under a head W (V, H), three stacked products and one kernel:

    1   [b; d] = [h; h_adv - h] W^T          (2C, V) fp32; from half-precision inputs on CUDA [b; a] = [h; h_adv] W^T
        rows of [b; d] -> loss, [S; G_a]     in place for fp32; G_a = dJ/da, S = dJ/da + dJ/db
    2   [S; G_a] W                           (2C, H) fp32     d h_adv = G_a W, d h = S W - G_a W
    3   dW += [S; G_a]^T [h; h_adv - h]      (V, H) fp32

The difference of the logits is no difference of two rounded products where fp32 allows it, and the two gradients are
never added after rounding: at a perturbation of 1e-5 that costs 1 % of d h and 6 % of dW. Where only the adversarial
side is wanted, S, half of product 2 and dW are left out, and half of product 1 where the caller kept the clean side's.
At most one chunk of logits exists at a time.

    differences   fp32 products, of fp32 inputs on any device and of every input on the CPU (half precision is widened)
    sides         half-precision products with fp32 output (``out_dtype``), of half-precision inputs on CUDA. Gradients
                  are bf16 between products, also of fp16 inputs: S, of second order, would vanish in fp16

Where the classes are split over ranks (``vocabulary_group.py``), W is the slice of this one: the row kernel is that of
``split_vocabulary.py``, product 2 is summed over the ranks while product 3 runs, and dW is the slice's alone. fp64 goes
that way too; otherwise the reference serves it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from alum_kernels.backends.soft_cap import soft_cap, uncap_gradients
from alum_kernels.backends.split_vocabulary import BYTES_PER_CLASS, SplitRows
from alum_kernels.backends.vocabulary_group import VocabularySplit

DEFAULT_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Bytes of a chunk of logits and their gradients, by device type."""

CHUNK_BYTES_VARIABLE = "ALUM_LINEAR_CHUNK_BYTES"

PLANS = ("differences", "sides")


class LinearOptions(NamedTuple):
    """What is computed, apart from the tensors, in the order of the op's schema."""

    divergence: str
    gradient: str
    inv_temperature: float = 1.0
    logit_scale: float = 1.0
    soft_cap_at: float | None = None
    masked_rows: str = "none"  # of weight zero: there are none, "gather" leaves them out, "keep" takes them for zeros
    chunk_bytes: int | None = None


@dataclass(frozen=True)
class Wanted:
    """Which gradients are formed."""

    adv_hidden: bool = False
    hidden: bool = False
    weight: bool = False
    bias: bool = False

    def any(self) -> bool:
        return self.adv_hidden or self.hidden or self.weight or self.bias


@dataclass
class LinearResult:
    """Loss of each row and the gradients that were wanted, fp32 (fp64 for fp64); rows of weight zero are zero."""

    rows: Tensor  # (N,)
    adv_hidden: Tensor | None = None  # (N, H)
    hidden: Tensor | None = None  # (N, H)
    weight: Tensor | None = None  # (V, H)
    bias: Tensor | None = None  # (V,)


def chunk_budget(chunk_bytes: int | None, device: torch.device) -> int:
    """The budget of a chunk: the argument, ``ALUM_LINEAR_CHUNK_BYTES``, or the default of the device type."""
    if chunk_bytes is not None:
        return chunk_bytes
    text = os.environ.get(CHUNK_BYTES_VARIABLE)
    if text is None:
        return DEFAULT_CHUNK_BYTES.get(device.type, DEFAULT_CHUNK_BYTES["cpu"])
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{CHUNK_BYTES_VARIABLE}: expected a number of bytes > 0, got {text!r}")
    return int(text)


def plan_of(hidden: Tensor, plan: str | None = None) -> str:
    """The plan that was named, or that of the inputs."""
    if plan is not None:
        if plan not in PLANS:
            raise ValueError(f"plan: expected one of {', '.join(map(repr, PLANS))}, got {plan!r}")
        return plan
    return "sides" if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16) else "differences"


def rows_in_chunk(
    rows: int, columns: int, options: LinearOptions, device: torch.device, gradient_bytes: int, split: bool = False
) -> int:
    """Rows of each chunk: as many as the budget holds, evenly over the chunks that it takes, at least one."""
    bytes_per_class = 8  # both products, and their gradients in the same place if they are fp32
    if split:
        bytes_per_class = (8 + BYTES_PER_CLASS) * max(gradient_bytes, 4) // 4
    if options.soft_cap_at is not None:
        bytes_per_class += 48  # with bias, capped, what the cap's passes hold, and gradients before and after them
    elif gradient_bytes == 2:
        bytes_per_class += 2 * gradient_bytes
    most = max(chunk_budget(options.chunk_bytes, device) // (columns * bytes_per_class), 1)
    chunks = max(-(-rows // most), 1)
    return max(-(-rows // chunks), 1)


def wide_product(x: Tensor, y: Tensor, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """x y in fp32 (fp64 for fp64), into ``out`` or added to it, accumulated in fp32 whatever the inputs' dtype.

    ``out_dtype`` of torch.mm exists on CUDA only; elsewhere half-precision inputs are widened, which gives the same.
    """
    if x.dtype in (torch.float32, torch.float64):
        if out is None:
            return torch.mm(x, y)
        return out.addmm_(x, y) if accumulate else torch.mm(x, y, out=out)
    if not x.is_cuda:
        return wide_product(x.float(), y.float(), out, accumulate)
    if out is None:
        return torch.mm(x, y, out_dtype=torch.float32)
    if accumulate:
        return torch.ops.aten.addmm.dtype_out(out, x, y, torch.float32, out=out)
    return torch.ops.aten.mm.dtype_out(x, y, torch.float32, out=out)


class LinearDivergence:
    """One call: the products' operands, the buffers of a chunk, and the results."""

    def __init__(
        self,
        kernel: ModuleType | SplitRows,
        adv_hidden: Tensor,  # (N, H)
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        row_weight: Tensor | None,  # (N,) fp32
        clean_products: Tensor | None,  # (N, V) fp32: hidden weight^T, where the caller kept them
        options: LinearOptions,
        wanted: Wanted,
        plan: str | None = None,  # that of the inputs, unless a test or a benchmark names one
        split: VocabularySplit | None = None,  # over ranks, of which weight and bias are this one's slice
    ) -> None:
        self.kernel, self.options, self.wanted, self.split = kernel, options, wanted, split
        self.differences = plan_of(hidden, plan) == "differences"
        self.wide = torch.promote_types(hidden.dtype, torch.float32)
        dtype = self.wide if self.differences else hidden.dtype
        self.adv_hidden, self.hidden, self.weight = adv_hidden, hidden, weight.to(dtype)
        self.bias = None if bias is None else bias.to(self.wide).contiguous()
        self.row_weight, self.clean_products = row_weight, clean_products
        self.dtype = dtype
        self.gradient_dtype = torch.bfloat16 if dtype == torch.float16 else dtype
        self.gradient_weight = self.weight.to(self.gradient_dtype)
        opposite = options.gradient == "detach_targets" and options.divergence == "symmetric_kl"
        # dJ/db = -dJ/da, so that S vanishes (under a soft cap they differ in the cap's slopes)
        self.opposite = opposite and options.soft_cap_at is None
        both = options.gradient == "full" or (opposite and not self.opposite)
        # both S and G_a are formed; otherwise G_a alone says everything
        self.pairs = both and (wanted.hidden or wanted.weight or wanted.bias)
        (rows, hidden_size), columns, device = hidden.shape, weight.shape[0], hidden.device

        def zeros(wanted: bool, *shape: int) -> Tensor | None:
            return torch.zeros(shape, dtype=self.wide, device=device) if wanted else None

        self.result = LinearResult(
            zeros(True, rows),
            zeros(wanted.adv_hidden, rows, hidden_size),
            zeros(wanted.hidden, rows, hidden_size),
            # the first chunk writes it, the others add to it
            torch.empty((columns, hidden_size), dtype=self.wide, device=device) if wanted.weight else None,
            zeros(wanted.bias, columns),
        )
        self._weight_written = False

    def run(self) -> LinearResult:
        """All chunks."""
        rows, columns = self.hidden.shape[0], self.weight.shape[0]
        kept = None
        if self.row_weight is not None and self.options.masked_rows == "gather":
            kept = self.row_weight.nonzero().squeeze(1)  # its length is a number: on CUDA the host waits for it
            rows = kept.shape[0]
        most = columns if self.split is None else max(self.split.sizes)  # the same chunks on every rank
        split = self.split is not None
        size = rows_in_chunk(rows, most, self.options, self.hidden.device, self.dtype.itemsize, split)
        # uninitialised, and written by the first product
        logits = torch.empty((2 * size, columns), dtype=self.wide, device=self.hidden.device)
        for begin in range(0, rows, size):
            chunk = slice(begin, min(begin + size, rows)) if kept is None else kept[begin : begin + size]
            count = chunk.stop - chunk.start if kept is None else chunk.shape[0]
            self._chunk(chunk, logits[: 2 * count])
        if self.wanted.weight and not self._weight_written:
            self.result.weight.zero_()
        return self.result

    def _chunk(self, chunk: slice | Tensor, logits: Tensor) -> None:
        count = logits.shape[0] // 2
        clean_hidden, adv_hidden = self.hidden[chunk], self.adv_hidden[chunk]
        keeps_masked = self.row_weight is not None and self.options.masked_rows == "keep"
        if keeps_masked:
            counts = (self.row_weight[chunk] != 0).unsqueeze(1)
            clean_hidden, adv_hidden = torch.where(counts, clean_hidden, 0), torch.where(counts, adv_hidden, 0)
        operands = torch.empty((2 * count, self.hidden.shape[1]), dtype=self.dtype, device=self.hidden.device)
        operands[:count] = clean_hidden
        if self.differences:
            torch.sub(adv_hidden.to(self.dtype), operands[:count], out=operands[count:])
        else:
            operands[count:] = adv_hidden
        clean, first = logits[:count], logits[count:]
        if self.clean_products is None:
            wide_product(operands, self.weight.T, out=logits)
        else:
            clean = self.clean_products[chunk]
            if self.options.soft_cap_at is not None and keeps_masked:
                # they may hold anything; the row kernel skips them, the passes of the cap do not
                clean = torch.where(counts, clean, 0)
            wide_product(operands[count:], self.weight.T, out=first)
        if self.options.soft_cap_at is None:
            gradients = self._rows(chunk, first, clean, logits)
        else:
            gradients = self._capped_rows(chunk, first, clean)
        if gradients is None:
            return
        if self.pairs:
            self._products_of_pairs(chunk, gradients, operands, clean_hidden, adv_hidden)
        else:
            self._products_of_one_side(chunk, gradients, operands, adv_hidden)

    def _rows(self, chunk: slice | Tensor, first: Tensor, clean: Tensor, logits: Tensor) -> Tensor | None:
        """The row kernel on a chunk; the gradients to the products, [S; G_a] or G_a, or None where none is wanted."""
        options, count = self.options, first.shape[0]
        inv_temperature = options.inv_temperature * options.logit_scale
        if not self.wanted.any():
            gradients = None
        elif self.dtype == self.wide:
            gradients = logits if self.pairs else logits[count:]
        else:
            # the CPU's row kernel writes fp32
            dtype = self.gradient_dtype if first.is_cuda else self.wide
            gradients = torch.empty(
                (2 * count if self.pairs else count, first.shape[1]), dtype=dtype, device=first.device
            )
        self._kernel(chunk, first, clean, self.bias, gradients, self.pairs, self.differences, inv_temperature)
        return None if gradients is None else gradients.to(self.gradient_dtype)

    def _capped_rows(self, chunk: slice | Tensor, first: Tensor, clean: Tensor) -> Tensor | None:
        """The same around a soft cap, whose own passes are PyTorch's."""
        options, count = self.options, first.shape[0]
        cap, scale = options.soft_cap_at, options.logit_scale
        difference = first if self.differences else first - clean
        biased = clean if self.bias is None else clean + self.bias
        capped_difference, capped_clean = soft_cap(difference, biased, cap, scale)
        gradients = None
        sums = self.pairs and options.gradient == "full"
        if self.wanted.any():
            shape = (2 * count if sums else count, first.shape[1])
            gradients = torch.empty(shape, dtype=self.wide, device=first.device)
        self._kernel(chunk, capped_difference, capped_clean, None, gradients, sums, True, options.inv_temperature)
        if gradients is None:
            return None
        grad_sum = gradients[:count] if sums else torch.zeros_like(gradients) if self.pairs else None
        grad_a, grad_sum = uncap_gradients(gradients[-count:], grad_sum, difference, biased, cap, scale)
        return (torch.cat([grad_sum, grad_a]) if self.pairs else grad_a).to(self.gradient_dtype)

    def _kernel(
        self,
        chunk: slice | Tensor,
        first: Tensor,  # (C, V)
        clean: Tensor,  # (C, V)
        bias: Tensor | None,
        gradients: Tensor | None,  # (2C, V) for [S; G_a], (C, V) for G_a
        sums: bool,
        differences: bool,
        inv_temperature: float,
    ) -> None:
        """The loss of a chunk's rows into the result, and the gradients where there is room for them."""
        count, options = first.shape[0], self.options
        none = first.new_empty(0, dtype=self.wide if gradients is None else gradients.dtype)
        rows = torch.empty((1, count), dtype=self.wide, device=first.device)
        self.kernel.divergence_rows(
            first.unsqueeze(0),
            clean.unsqueeze(0),
            bias,
            None if self.row_weight is None else self.row_weight[chunk].unsqueeze(0),
            rows,
            none if gradients is None else gradients[-count:].unsqueeze(0),
            gradients[:count].unsqueeze(0) if gradients is not None and sums else none,
            differences,
            options.divergence,
            options.gradient,
            inv_temperature,
        )
        self.result.rows[chunk] = rows[0]

    def _products_of_pairs(
        self, chunk: slice | Tensor, gradients: Tensor, operands: Tensor, clean_hidden: Tensor, adv_hidden: Tensor
    ) -> None:
        count, result = gradients.shape[0] // 2, self.result
        through = self._through(gradients) if self.wanted.adv_hidden or self.wanted.hidden else None
        if self.wanted.weight:
            if not self.differences:
                # exact in fp32, rounded to the products' dtype once
                operands[count:] = adv_hidden.float() - clean_hidden.float()
            self._add_to_weight(gradients, operands)
        if self.wanted.bias:
            result.bias += gradients[:count].sum(0, dtype=self.wide)
        if through is not None:
            through = through()
            if self.wanted.adv_hidden:
                result.adv_hidden[chunk] = through[count:]
            if self.wanted.hidden:
                result.hidden[chunk] = through[:count] - through[count:]

    def _products_of_one_side(
        self, chunk: slice | Tensor, gradients: Tensor, operands: Tensor, adv_hidden: Tensor
    ) -> None:
        count, result = gradients.shape[0], self.result
        to_hidden = self.wanted.hidden and self.opposite
        through = self._through(gradients) if self.wanted.adv_hidden or to_hidden else None
        if self.wanted.weight:
            if not self.opposite:
                operands[count:] = adv_hidden
            elif not self.differences:
                operands[count:] = adv_hidden.float() - operands[:count].float()
            self._add_to_weight(gradients, operands[count:])
        if self.wanted.bias and not self.opposite:
            result.bias += gradients.sum(0, dtype=self.wide)
        if through is not None:
            through = through()
            if self.wanted.adv_hidden:
                result.adv_hidden[chunk] = through
            if to_hidden:
                result.hidden[chunk] = -through

    def _through(self, gradients: Tensor) -> Callable[[], Tensor]:
        """Product 2, over all classes: over the ranks it is summed from here on, and has been once it is called for."""
        through = wide_product(gradients, self.gradient_weight)
        return (lambda: through) if self.split is None else self.split.summed(through)

    def _add_to_weight(self, gradients: Tensor, operands: Tensor) -> None:
        operands = operands.to(self.gradient_dtype)
        wide_product(gradients.T, operands, out=self.result.weight, accumulate=self._weight_written)
        self._weight_written = True
