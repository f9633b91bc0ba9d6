"""Calls of the divergences of a linear head and of its cross-entropy: against the definition, products included.

The truth is written from the logits: b = h W^T + bias and a = b + (h_adv - h) W^T in float64, autograd through both to
the operands. An error may be what the products' own rounding makes of the sizes that are added up in them, which are
found by the same products of absolute values.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

import alum_kernels
from alum_kernels.backends.reference import symmetric_kl as reference
from alum_kernels.ops.linear_cross_entropy import linear_cross_entropy
from alum_kernels.ops.reductions import REDUCTIONS
from alum_kernels.ops.symmetric_kl import GRADIENTS
from fuzzing.divergences import row_weights
from fuzzing.draws import Draw, Held
from fuzzing.judgement import Judgement, beyond_rounding

OPS = ("linear_symmetric_kl", "linear_kl", "linear_symmetric_kl_grad", "linear_cross_entropy")
WEIGHTS = (3, 2, 2, 1)
COLUMNS = (1, 2, 3, 5, 16, 33, 63, 64, 65, 70, 129, 257, 1000, 2049)
SIZES = (1, 2, 3, 7, 8, 16, 17, 33, 64, 100)
ROWS = (0, 1, 2, 3, 5, 8, 17, 33)
NAMES = ("adv_hidden", "hidden", "weight", "bias")
PLACE = 2.0**-24
ROUNDINGS = 4.0

Tensors = dict[str, Held | None]


def draw(draw: Draw, op: str) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and options of one call."""
    dtype = draw.choice((torch.float32, torch.bfloat16, torch.float16, torch.float64), (8, 2, 2, 1))
    columns = draw.choice([v for v in COLUMNS if v <= (130 if draw.small and draw.chance(0.9) else 3000)])
    size, rows = draw.choice(SIZES), draw.choice([n for n in ROWS if n <= (4 if draw.small else 40)])
    leading = draw.choice(((rows,), (rows, draw.choice((1, 2)))), (3, 1))
    entropy = op == "linear_cross_entropy"
    leading = leading[:1] if entropy else leading
    hidden = draw.normal(*leading, size)
    change = draw.size(1e-6, 10) * draw.normal(*leading, size)
    if draw.chance(0.05):
        change = torch.zeros_like(change)
    weight = draw.choice((0.02, 0.5, 2.0)) * draw.normal(columns, size)
    if draw.chance(0.2):
        weight[draw.integer(0, columns - 1)] = 0.0  # as of a padding token
    bias = draw.normal(columns) if draw.chance(0.6) else None
    options: dict[str, Any] = {"logit_scale": draw.choice((1.0, 0.5, 1.7), (4, 1, 1))}
    options["soft_cap"] = draw.choice((None, 3.0, 30.0), (4, 1, 1))
    options["chunk_bytes"] = draw.choice((None, 1, 8 * columns * 2, 8 * columns * 7), (2, 1, 1, 1))
    if bias is not None and options["soft_cap"] is None and not entropy and draw.chance(0.15) and columns > 2:
        bias[draw.uniform(columns) < 0.4] = -torch.inf
        bias[draw.integer(0, columns - 1)] = 0.0
    tensors: Tensors = {} if entropy else {"mask": draw.mask(*leading)}
    if entropy:
        tensors["labels"] = draw.lay(draw.indices(columns, *leading), torch.int64)
    else:
        _draw_divergence(draw, op, tensors, options, dtype, leading)
        mask = tensors["mask"]
        if mask is not None and draw.chance(0.7):  # what a masked row holds counts nowhere
            hidden[mask.tensor == 0] = draw.choice((torch.nan, torch.inf))
            change[mask.tensor == 0] = draw.choice((torch.nan, 1.0))
        # an expanded layout would hand it to other rows
        tensors["adv_hidden"] = draw.lay(hidden + change, dtype, expand=bool(hidden.isfinite().all()))
    tensors["hidden"] = draw.lay(hidden, dtype, expand=bool(hidden.isfinite().all()))
    tensors["weight"] = draw.lay(weight, dtype)
    tensors["bias"] = None if bias is None else draw.lay(bias, dtype, expand=bool(bias.isfinite().all()))
    return tensors, options


def _draw_divergence(draw: Draw, op: str, tensors: Tensors, options: dict, dtype: torch.dtype, leading) -> None:
    options["reduction"] = draw.choice(REDUCTIONS)
    options["temperature"] = draw.choice((1.0, 2.0, 0.7), (4, 1, 1))
    options["gather_rows"] = draw.chance(0.5)
    if op == "linear_symmetric_kl_grad":
        options["divergence"] = draw.choice(("symmetric_kl", "kl"))
        options["grad_scale"] = draw.choice((1.0, 1024.0, 0.37))
        options["kept"] = draw.chance(0.4)  # the clean products
        return
    options["gradient"] = draw.choice(GRADIENTS, (3, 1, 1))
    shape = leading if options["reduction"] == "none" else ()
    upstream = torch.where(draw.uniform(*shape) < 0.1, 0, draw.normal(*shape))
    tensors["upstream"] = draw.lay(upstream, torch.float64 if dtype == torch.float64 else torch.float32)


def run(op: str, tensors: Tensors, options: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """What the call returns, and the gradient of its sum times upstream to each operand."""
    given = {name: None if one is None else one.tensor for name, one in tensors.items()}
    upstream, options = given.pop("upstream", None), dict(options)
    if op == "linear_symmetric_kl_grad":
        products = None
        if options.pop("kept"):
            products = alum_kernels.linear_products(given["hidden"], given["weight"])
        loss, gradient = alum_kernels.linear_symmetric_kl_grad(
            **given, **options, clean_products=products, backend=backend
        )
        return {"loss": loss, "adv_hidden": gradient}
    leaves = {n: given[n].detach().requires_grad_() for n in NAMES if given.get(n) is not None}
    if op == "linear_cross_entropy":
        loss = linear_cross_entropy(**{**given, **leaves}, **options)
    else:
        loss = getattr(alum_kernels, op)(**{**given, **leaves}, **options, backend=backend)
    gradients = torch.autograd.grad(loss, tuple(leaves.values()), upstream, allow_unused=True)
    return {"loss": loss.detach(), **{n: g for n, g in zip(leaves, gradients, strict=True) if g is not None}}


class _Rows(torch.autograd.Function):
    """Float64 divergence of each row of two logits whose difference is known."""

    @staticmethod
    def forward(ctx, difference, clean, name, gradient, inv_temperature):
        ctx.save_for_backward(difference, clean)
        ctx.options = {"divergence": name, "gradient": gradient, "inv_temperature": inv_temperature}
        arguments = {"divergence": name, "inv_temperature": inv_temperature, "difference": difference}
        return reference.loss(clean + difference, clean, None, **arguments)[0]

    @staticmethod
    def backward(ctx, upstream):
        difference, clean = ctx.saved_tensors
        return *reference.linear_gradient(difference, clean, upstream, **ctx.options), None, None, None


def _capped(x: Tensor, options: dict[str, Any]) -> Tensor:
    cap, x = options["soft_cap"], x * options["logit_scale"]
    return x if cap is None else cap * torch.tanh(x / cap)


def check(op: str, tensors: Tensors, options: dict[str, Any], results: dict[str, Tensor], judge: Judgement) -> None:
    """Judge what :func:`run` gave."""
    wide = torch.promote_types(tensors["hidden"].tensor.dtype, torch.float32)
    judge.require(results["loss"].dtype == wide, f"loss: {results['loss'].dtype} instead of {wide}")
    if op == "linear_cross_entropy":
        return _check_entropy(tensors, options, results, judge)
    name = options.get("divergence", op.removeprefix("linear_"))
    leaves = {n: tensors[n].tensor.detach().double() for n in NAMES if tensors.get(n) is not None}
    size = leaves["hidden"].shape[-1]
    mask, reduction, leading = tensors["mask"], options["reduction"], leaves["hidden"].shape[:-1]
    share = row_weights(None if mask is None else mask.tensor, reduction, leading).reshape(-1)
    kept = (share != 0).nonzero()[:, 0]
    for side in ("adv_hidden", "hidden"):
        leaves[side] = leaves[side].reshape(-1, size)[kept]
    leaves = {n: x.requires_grad_() for n, x in leaves.items()}
    bias = leaves.get("bias", torch.zeros(()))
    clean = leaves["hidden"] @ leaves["weight"].T + bias
    difference = (leaves["adv_hidden"] - leaves["hidden"]) @ leaves["weight"].T
    if options["soft_cap"] is None:
        difference, clean = difference * options["logit_scale"], clean * options["logit_scale"]
    else:
        difference, clean = _capped_pair(difference, clean, options)
    inv_temperature = 1 / options["temperature"]
    gradient = options.get("gradient", "detach_clean")
    inv_temperature = inv_temperature if wide == torch.float64 else float(np.float32(inv_temperature))
    rows = _Rows.apply(difference, clean, name, gradient, inv_temperature)
    upstream = torch.full((), float(options.get("grad_scale", 1.0))).double()
    if "upstream" in tensors:
        upstream = tensors["upstream"].tensor.double()
    factor = (share * upstream.expand(leading).reshape(-1))[kept]
    wanted = torch.autograd.grad((rows * factor).sum(), tuple(leaves.values()), allow_unused=True)
    wanted = dict(zip(leaves, wanted, strict=True))
    place = PLACE if wide == torch.float32 else 2.0**-52
    sizes = _Sizes(
        leaves, options, rows.detach(), difference.detach(), clean.detach(), factor, name, inv_temperature, place
    )
    _check_loss(results["loss"], rows.detach(), share, kept, leading, reduction, sizes, judge)
    for n in NAMES:
        if n not in results:
            expected = n in leaves and wanted[n] is not None and op != "linear_symmetric_kl_grad"
            expected = expected and not (n == "hidden" and gradient == "detach_clean")
            judge.require(not expected, f"gradient of {n}: missing")
            continue
        _check_gradient(n, results[n], tensors[n].tensor, wanted[n], kept, sizes, judge)


def _capped_pair(difference: Tensor, clean: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(a - b, b) of soft-capped logits, by tanh x - tanh y = sinh(x - y) / (cosh x cosh y), which keeps its digits."""
    cap = options["soft_cap"]
    d, y = (x * (options["logit_scale"] / cap) for x in (difference, clean))
    change = torch.sinh(d) / (torch.cosh(y + d) * torch.cosh(y))
    return cap * change, cap * torch.tanh(y)


class _Sizes:
    """How large the errors of each result may be: roundings of the numbers that are added up in it."""

    def __init__(self, leaves, options, rows, difference, clean, factor, name, inv_temperature, place) -> None:
        hidden, adv_hidden, weight = (leaves[n].detach() for n in ("hidden", "adv_hidden", "weight"))
        self.hidden, self.change, self.weight = hidden.abs(), (adv_hidden - hidden).abs(), weight.abs()
        roundings = (ROUNDINGS + math.sqrt(hidden.shape[-1])) * place
        scale = options["logit_scale"] * inv_temperature
        bias = leaves["bias"].detach().abs() if "bias" in leaves else torch.zeros(weight.shape[0]).double()
        bias = torch.where(bias.isfinite(), bias, 0)
        reach = (self.hidden @ self.weight.T + bias).amax(-1) * scale
        moved = (self.change @ self.weight.T).amax(-1) * scale
        # a logit is off by so much, and a difference
        self.off, self.off_difference = roundings * (reach + moved), roundings * moved
        one = torch.ones_like(rows)
        arguments = {"divergence": name, "gradient": "full", "inv_temperature": inv_temperature}
        side, total = reference.linear_gradient(difference, clean, one, **arguments)
        self.side, self.total = side.abs(), total.abs()
        self.rows, self.factor, self.inv_temperature = rows, factor.abs(), inv_temperature
        x, y = (clean + difference) * inv_temperature, clean * inv_temperature
        self.p_q = x.softmax(-1) + y.softmax(-1)
        self.loss = (1e-6 + 2 * self.off) * rows + self.off_difference * self.side.sum(-1) / inv_temperature
        self.loss = self.loss + 4 * self.off_difference**2 + 4 * weight.shape[0] * 2.0**-126
        # the gradient of one class: its own relative error, and what the error of the difference does to it
        share = (1e-5 + 2 * self.off).unsqueeze(-1)
        off, slope = self.off_difference.unsqueeze(-1), options["logit_scale"]
        spread = (difference.abs().amax(-1) * inv_temperature).unsqueeze(-1)
        first = (share * self.side.amax(-1, keepdim=True) + 2 * off * (1 + spread) * self.p_q * inv_temperature) * slope
        second = share * self.total.amax(-1, keepdim=True) + 2 * off * (spread + off) * self.p_q * inv_temperature
        self.of_side = first * self.factor.unsqueeze(-1)
        self.of_total = second * slope * self.factor.unsqueeze(-1)

    def of(self, name: str) -> Tensor:
        """The tolerance of a gradient, element by element."""
        if name == "adv_hidden":
            return self.of_side @ self.weight
        if name == "hidden":
            return (self.of_side + self.of_total) @ self.weight
        if name == "bias":
            return self.of_total.sum(0) + self.of_side.sum(0)
        return self.of_total.T @ self.hidden + self.of_side.T @ (self.change + self.hidden)


def _check_loss(loss, rows, share, kept, leading, reduction, sizes: _Sizes, judge: Judgement) -> None:
    if reduction == "none":
        judge.require(loss.shape == leading, f"loss: shape {tuple(loss.shape)} instead of {tuple(leading)}")
        flat = loss.reshape(-1)
        silent = torch.ones(flat.shape, dtype=torch.bool).index_fill_(0, kept, False)
        judge.require((flat[silent] == 0).all(), "loss where masked: not zero")
        judge.within("loss", (flat[kept].double() - rows).abs(), sizes.loss)
        return
    weights = share[kept]
    tolerance = (weights * (sizes.loss + 8 * PLACE * rows)).sum()
    judge.within("loss", (loss.double() - (weights * rows).sum()).abs(), tolerance + 2.0**-126)


def _check_gradient(name, got, operand, want, kept, sizes: _Sizes, judge: Judgement) -> None:
    judge.require(got.dtype == operand.dtype and got.shape == operand.shape, f"gradient of {name}: {got.dtype}")
    want = torch.zeros(sizes.hidden.shape if "hidden" in name else operand.shape).double() if want is None else want
    if "hidden" in name:
        flat = got.reshape(-1, got.shape[-1])
        silent = torch.ones(len(flat), dtype=torch.bool).index_fill_(0, kept, False)
        judge.require((flat[silent] == 0).all(), f"gradient of {name} where masked: not zero")
        got = flat[kept]
    judge.within(f"gradient of {name}", beyond_rounding(got, want), sizes.of(name) + 2.0**-126)


def _check_entropy(tensors: Tensors, options: dict[str, Any], results: dict[str, Tensor], judge: Judgement) -> None:
    """Value and gradients within the rounding of the operands' dtype, in which PyTorch forms the logits."""
    leaves = {n: tensors[n].tensor.detach().double().requires_grad_() for n in NAMES if tensors.get(n) is not None}
    logits = torch.nn.functional.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))
    logits = _capped(logits, options)
    labels = tensors["labels"].tensor
    want = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    wanted = torch.autograd.grad(want, tuple(leaves.values()))
    dtype = tensors["hidden"].tensor.dtype
    size, rows = leaves["hidden"].shape[-1], leaves["hidden"].shape[0]
    places = torch.finfo(dtype).eps * (ROUNDINGS + math.sqrt(size))
    bias = leaves["bias"].detach().abs() if "bias" in leaves else 0
    reach = (leaves["hidden"].detach().abs() @ leaves["weight"].detach().abs().T + bias) * options["logit_scale"]
    off = places * (1 + (reach.amax(-1) if rows else reach.new_zeros(0)))  # of a logit
    judge.within("loss", (results["loss"].double() - want).abs(), off.sum() + places * want)
    q = logits.detach().softmax(-1)
    slope = 2 * q + torch.nn.functional.one_hot(labels, q.shape[-1])
    errors = off.unsqueeze(-1) * slope * options["logit_scale"]
    hidden, weight = leaves["hidden"].detach().abs(), leaves["weight"].detach().abs()
    allowed = {"hidden": errors @ weight, "weight": errors.T @ hidden, "bias": errors.sum(0)}
    # of subnormal numbers, which PyTorch rounds more than once
    floor = max(4 * torch.finfo(dtype).tiny * torch.finfo(dtype).eps, 2.0**-126)
    for n, exact in zip(leaves, wanted, strict=True):
        tolerance = 2 * allowed[n] + places * exact.abs() + floor
        judge.within(f"gradient of {n}", (results[n].double() - exact).abs(), tolerance)
