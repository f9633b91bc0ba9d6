"""Calls of the functions of two logits: values, gradients of both sides, edges."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

import alum_kernels
from alum_kernels.ops.reductions import REDUCTIONS
from alum_kernels.ops.symmetric_kl import DIVERGENCES, GRADIENTS
from fuzzing.draws import Draw, Held
from fuzzing.judgement import Judgement, beyond_rounding
from fuzzing.logits import KINDS, Truth, draw_pair, draw_shape, lay_pair, spoil, truth

OPS = ("symmetric_kl", "kl", "js", "squared_hellinger", "symmetric_kl_grad", "squared_error")
WEIGHTS = (5, 3, 1, 1, 4, 1)
HOME_REACH, HOME_CHANGE = 80.0, 60.0
"""Largest logit, and largest difference of two, over the temperature, up to which the promised bounds hold: logits of
8 randn + 24 and perturbations of 10 randn lie within. Further out the rounding of the logits themselves counts too."""
FARTHEST = 1e7
"""From here on the last place of an fp32 logit is a factor of e in a weight: regular rows need only be finite ..."""
BEYOND = 1e25
"""... up to here, where a weight of e^31 times a difference still is."""
FEW_TERMS = 64
ALLOWED_PLACES = 4.0
"""So many roundings of the logits are let off there."""


def draw(draw: Draw, op: str) -> tuple[dict[str, Held | None], dict[str, Any]]:
    """Tensors and options of one call."""
    shape = draw_shape(draw)
    rows = shape[:-1]
    dtype = draw.choice((torch.float32, torch.bfloat16, torch.float16, torch.float64), (8, 2, 2, 1))
    shares = (14, 1, 1, 2, 2, 3, 14 if shape[-1] > 8192 else 2, 1)
    # the square of a huge number is infinite in fp32
    kind = draw.choice(("usual", "equal"), (9, 1)) if op == "squared_error" else draw.choice(KINDS, shares)
    a, b = draw_pair(draw, shape, kind)
    mask = draw.mask(*rows)
    count = a[..., 0].numel()
    if count and draw.chance(0.3) and op != "squared_error":
        spoil(draw, a.view(-1, shape[-1]), b.view(-1, shape[-1]))
    if count and mask is not None and draw.chance(0.7):  # what a masked row holds counts nowhere
        silent = mask.tensor == 0
        a[silent], b[silent] = draw.choice((torch.nan, torch.inf, -torch.inf)), draw.choice((torch.nan, 1.0))
    # an expanded layout hands one row's numbers to others
    first, second = lay_pair(draw, a, b, dtype, expand=op != "squared_error" or bool((a + b).isfinite().all()))
    options: dict[str, Any] = {"reduction": draw.choice(REDUCTIONS)}
    conventions = ("full", "detach_clean") if op == "squared_error" else GRADIENTS
    options["gradient"] = draw.choice(conventions, (3, *[1] * (len(conventions) - 1)))
    if op != "squared_error":
        temperatures = (1.0, 0.5, 2.0, 0.7, 1.5, 10.0)[: 3 if kind == "huge" else 6]
        options["temperature"] = draw.choice(temperatures, (6, 1, 1, 1, 1, 1)[: len(temperatures)])
    tensors = {"adv_logits": first, "logits": second, "mask": mask}
    if op == "symmetric_kl_grad":
        options["divergence"] = draw.choice(DIVERGENCES, (4, 2, 1, 1))
        options["grad_scale"] = draw.choice((1.0, 1024.0, 0.37, 0.0), (4, 2, 2, 1))
        options["clean_gradient"] = draw.chance(0.5)
    else:
        loss_shape = rows if options["reduction"] == "none" else ()
        upstream = draw.normal(*loss_shape) * draw.choice((1.0, 1e-3, 64.0))
        upstream = torch.where(draw.uniform(*loss_shape) < 0.1, 0, upstream)
        tensors["upstream"] = draw.lay(upstream, torch.float64 if dtype == torch.float64 else torch.float32)
    return tensors, options


def run(op: str, tensors: dict[str, Held | None], options: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """What the call returns, and the gradients of its sum times upstream."""
    a, b = tensors["adv_logits"].tensor, tensors["logits"].tensor
    mask = None if tensors["mask"] is None else tensors["mask"].tensor
    if op != "squared_error":
        options = {**options, "backend": backend}
    function = getattr(alum_kernels, op)
    if op == "symmetric_kl_grad":
        names = ("loss", "grad_a", "grad_b")
        return dict(zip(names, function(a, b, mask=mask, **options), strict=False))
    x, y = a.detach().requires_grad_(), b.detach().requires_grad_()
    loss = function(x, y, mask=mask, **options)
    grads = torch.autograd.grad(loss, (x, y), tensors["upstream"].tensor, allow_unused=True)
    return {"loss": loss.detach(), **{f"grad_{side}": g for side, g in zip("ab", grads, strict=True) if g is not None}}


def row_weights(mask: Tensor | None, reduction: str, rows: torch.Size) -> Tensor:
    """(...) float64 share of each row in the result, by the definition."""
    kept = torch.ones(rows, dtype=torch.float64) if mask is None else (mask != 0).double()
    if reduction == "mean":
        return kept / kept.sum().clamp(min=1)
    return kept / max(rows[0], 1) if reduction == "batchmean" else kept


def _difference(a: Tensor, b: Tensor, gradient: str) -> Truth:
    """The truth of ``squared_error``, whose conditioning is that of a sum of squares."""
    d = a.detach().double() - b.detach().double()
    none = torch.zeros(d.shape[0], dtype=torch.float64)
    side = torch.zeros_like(d) if gradient == "detach_clean" else -2 * d
    no, never = none.bool(), torch.zeros_like(d, dtype=torch.bool)
    return Truth((d**2).sum(-1), 2 * d, side, no, never, (d == 0).all(-1), none, none, none, none, none, none)


def check(
    op: str, tensors: dict[str, Held | None], options: dict[str, Any], results: dict[str, Tensor], judge: Judgement
) -> None:
    """Judge what :func:`run` gave."""
    a, b = tensors["adv_logits"].tensor, tensors["logits"].tensor
    mask = None if tensors["mask"] is None else tensors["mask"].tensor
    rows, columns, reduction = a.shape[:-1], a.shape[-1], options["reduction"]
    wide = torch.promote_types(a.dtype, torch.float32)
    inv_temperature = 1.0 / options.get("temperature", 1.0)
    if wide == torch.float32:  # the temperature that the kernels are given
        inv_temperature = float(np.float32(inv_temperature))
    flat_a, flat_b = a.reshape(-1, columns), b.reshape(-1, columns)
    weight = row_weights(mask, reduction, rows).reshape(-1)
    counts = weight != 0
    if op == "squared_error":
        settled = [torch.where(counts[:, None], x.double(), 0) for x in (flat_a, flat_b)]
        true = _difference(*settled, options["gradient"])
    else:
        name = options.get("divergence", op)
        true = truth(name, flat_a, flat_b, options["gradient"], inv_temperature)
    value = torch.where(counts, true.loss, 0)
    tolerance = _value_tolerance(true, columns, wide)
    loss = results["loss"]
    judge.require(loss.dtype == wide, f"loss: {loss.dtype} instead of {wide}")
    if reduction == "none":
        judge.require(loss.shape == rows, f"loss: shape {tuple(loss.shape)} instead of {tuple(rows)}")
        near = true.reach < FARTHEST
        _judge_values(judge, loss.reshape(-1)[near], value[near], tolerance[near], (true.alike | ~counts)[near])
    else:
        judge.require(loss.shape == (), f"loss: shape {tuple(loss.shape)} instead of a scalar")
        shares = torch.where(counts, weight * value, 0)
        regular = torch.where(counts & value.isfinite(), weight * (tolerance + 4 * 2.0**-24 * value), 0).sum()
        if (true.reach[counts] < FARTHEST).all():
            _judge_values(judge, loss.reshape(1), shares.sum().reshape(1), regular.reshape(1), torch.zeros(1).bool())
    _check_gradients(op, tensors, options, results, true, weight, judge)


def _judge_values(judge: Judgement, got: Tensor, want: Tensor, tolerance: Tensor, zero: Tensor) -> None:
    judge.exactly("loss that is not finite", got[~want.isfinite()].double(), want[~want.isfinite()])
    judge.exactly("loss that is zero", got[zero].double(), torch.zeros_like(want[zero]))
    finite = want.isfinite() & ~zero
    judge.within("loss", (got.double() - want).abs()[finite], tolerance[finite])


def _at_home(true: Truth) -> Tensor:
    return (true.reach <= HOME_REACH) & (true.change <= HOME_CHANGE)


def _away(true: Truth, wide: torch.dtype) -> Tensor:
    """(N,) roundings of a difference of two logits and, outside of the domain of the promised bounds, of a logit."""
    place = ALLOWED_PLACES * (2.0**-24 if wide == torch.float32 else 2.0**-53)
    return place * torch.where(_at_home(true), true.common, torch.maximum(true.reach, true.change))


def _value_tolerance(true: Truth, columns: int, wide: torch.dtype) -> Tensor:
    if wide == torch.float64:
        return 1e-12 * true.loss + 1e-300
    # in a sum of many terms their roundings average out, unless a few make it up
    few = (true.terms <= FEW_TERMS) | (columns <= FEW_TERMS)
    base = torch.where(few | (true.change > HOME_CHANGE), 4e-6, 1e-6)
    away = _away(true, wide)
    return base * true.loss + away * true.slope + away**2 + columns * 2.0**-126


def _check_gradients(op, tensors, options, results, true: Truth, weight: Tensor, judge: Judgement) -> None:
    a = tensors["adv_logits"].tensor
    columns = a.shape[-1]
    if op == "symmetric_kl_grad":
        upstream = torch.full_like(weight, options["grad_scale"])
    else:
        upstream = tensors["upstream"].tensor.double().expand(a.shape[:-1]).reshape(-1)
    factor = weight * upstream
    if a.dtype != torch.float64:  # a product of two fp32 numbers below the smallest is zero
        factor = torch.where(factor.abs() < 2.0**-126, 0, factor)
    for side, want in (("a", true.grad_a), ("b", true.grad_b)):
        name = f"grad_{side}"
        if name not in results:
            none = side == "b" and (options["gradient"] == "detach_clean" or not options.get("clean_gradient", True))
            judge.require(none, f"{name}: missing")
            continue
        got = results[name]
        judge.require(got.dtype == a.dtype and got.shape == a.shape, f"{name}: {got.dtype} {tuple(got.shape)}")
        got = got.reshape(-1, columns)
        silent = factor == 0
        nothing = side == "b" and options["gradient"] == "detach_clean" and op == "symmetric_kl_grad"
        judge.require((got[silent | (nothing & ~silent)] == 0).all(), f"{name}: a row that counts nowhere is not zero")
        if nothing:
            continue
        undefined = true.undefined & ~silent
        judge.require(got[undefined].isnan().all(), f"{name}: a row without a divergence is not NaN")
        regular = ~true.undefined & ~silent & (true.reach < FARTHEST)
        judge.require((got[true.dead & regular[:, None]] == 0).all(), f"{name}: a dead class is not zero")
        judge.require((got[true.alike & regular] == 0).all(), f"{name}: equal sides, but not zero")
        _judge_gradient(judge, name, got[regular], (want * factor[:, None])[regular], true, factor, regular)
        far = ~true.undefined & ~silent & (true.reach >= FARTHEST) & (torch.maximum(true.reach, true.change) < BEYOND)
        judge.require(got.dtype == torch.float16 or got[far].isfinite().all(), f"{name}: not finite, of huge logits")


def _judge_gradient(judge: Judgement, name: str, got: Tensor, want: Tensor, true: Truth, factor, regular) -> None:
    """The relative L2 error over the rows within the promised domain, and of each row outside of it."""
    if got.numel() == 0:
        return
    wide = torch.promote_types(got.dtype, torch.float32)
    judge.require(got.isfinite().all() or got.dtype == torch.float16, f"{name}: not finite")
    error, size = beyond_rounding(got, want).norm(dim=-1), want.norm(dim=-1)
    away, change, home = _away(true, wide)[regular], true.change[regular], _at_home(true)[regular]
    if wide == torch.float64:
        judge.within(name, error, 1e-11 * size + 1e-300)
        return
    bound = torch.where(change > HOME_CHANGE, 1e-4, 1e-5)
    floor = 2.0**-126 * got.shape[-1] ** 0.5
    share = factor[regular].abs() * true.weight[regular]
    judge.within(f"{name}, as a whole", error[home].norm(), (bound * size + away * share)[home].norm() + floor)
    judge.within(name, error[~home], ((bound + away) * size + away * share * (1 + change) + floor)[~home])
