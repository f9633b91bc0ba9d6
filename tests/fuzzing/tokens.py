"""Calls of ``noise_init`` and ``projected_ascent``: against their definitions in float64, group by group."""

from typing import Any

import numpy as np
import oracle
import torch
from torch import Tensor

from alum_kernels import noise_init, projected_ascent
from alum_kernels.ops.checks import DISTRIBUTIONS
from alum_kernels.ops.projected_ascent import LEVELS, NORMALIZE, NORMS, STATISTICS
from fuzzing.draws import Draw, Held
from fuzzing.judgement import Judgement

OPS = ("noise_init", "projected_ascent")
WEIGHTS = (3, 6)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HIDDEN = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 128, 129, 255, 257, 768, 1025, 2049)
ROUNDINGS = 8.0
"""An element goes through at most this many fp32 roundings, those of its group's norms included."""
NOISE_ERROR = 1.01e-6
"""Of unit noise, absolute."""

Tensors = dict[str, Held | None]


def _draw_shape(draw: Draw) -> tuple[int, int, int]:
    hidden = draw.choice([h for h in HIDDEN if h <= (70 if draw.small and draw.chance(0.9) else 3000)])
    batch, length = draw.choice((0, 1, 2, 3, 5), (1, 6, 6, 4, 2)), draw.choice((0, 1, 2, 3, 7, 17), (1, 6, 6, 4, 3, 1))
    return batch, min(length, 3) if draw.small else length, hidden


def _draw_magnitude(draw: Draw, tensors: Tensors, options: dict, name: str, value: float, shape, forms=4) -> None:
    """A float, or a tensor of values within a factor of two of it: 0-d, (B,) or (B, S)."""
    form = draw.integer(0, forms - 1)
    if form == 0:
        options[name] = value
        return
    of_shape = ((), shape[:1], shape[:2])[form - 1]
    tensors[name] = draw.lay(value * (1 + draw.uniform(*of_shape)), torch.float32)


def _draw_noise(draw: Draw, tensors: Tensors, options: dict, shape) -> None:
    _draw_magnitude(draw, tensors, options, "std", draw.choice((0.0, 1.0, draw.size(1e-38, 1e30))), shape)
    seed = draw.choice((0, 1, -1, 2**63 - 1, -(2**63), draw.integer(-(2**62), 2**62)))
    if draw.chance(0.5):
        tensors["seed"] = draw.lay(torch.tensor([seed]), torch.int64, layout="contiguous")
    else:
        options["seed"] = seed
    options["distribution"] = draw.choice(DISTRIBUTIONS)
    options["stream"] = draw.choice((0, 1, 2**32 - 1))
    options["sample_offset"] = draw.choice((0, 1, 2**32 - 2, 2**33 + 5))


def draw(draw: Draw, op: str) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and options of one call."""
    shape = _draw_shape(draw)
    dtype = draw.choice(DTYPES, (6, 2, 2, 1))
    # Triton's interpreter does not round subnormal numbers of bf16 as the hardware does
    least = 1e-30 if dtype == torch.bfloat16 else 1e-38
    embeds = draw.normal(*shape) * draw.choice((1.0, draw.size(least, 1e30)))
    if draw.chance(0.1):
        embeds[draw.uniform(*shape) < 0.1] = draw.choice((torch.nan, torch.inf, -torch.inf))
    tensors: Tensors = {"embeds": draw.lay(embeds, dtype), "mask": draw.mask(*shape[:2])}
    options: dict[str, Any] = {}
    if op == "noise_init":
        _draw_noise(draw, tensors, options, shape)
        options["return_delta"] = draw.chance(0.8)
        return tensors, options
    options |= {"norm": draw.choice(NORMS), "normalize": draw.choice(NORMALIZE), "level": draw.choice(LEVELS)}
    kept = torch.ones(shape[:2], dtype=torch.bool) if tensors["mask"] is None else tensors["mask"].tensor != 0
    size = 1.0
    if draw.chance(0.3):
        _draw_noise(draw, tensors, options, shape)
    else:
        size = draw.choice((1.0, 1e-5, draw.size(1e-30, 1e30)))
        delta = size * draw.normal(*shape)
        delta[~kept] = draw.choice((0.0, torch.nan, 1e30))
        tensors["delta"] = draw.lay(delta, torch.float64 if dtype == torch.float64 else torch.float32, expand=False)
    _draw_step(draw, tensors, options, shape, size)
    _draw_gradient(draw, tensors, options, shape, dtype, kept)
    options["return_delta"], options["return_stats"] = draw.chance(0.8), draw.chance(0.6)
    return tensors, options


def _draw_step(draw: Draw, tensors: Tensors, options: dict, shape, size: float) -> None:
    """A step and a radius that have to do with the perturbation, mostly."""
    step = draw.choice((0.0, size, 0.1 * size, 10 * size, draw.size(1e-30, 1e3)), (1, 3, 3, 2, 1))
    _draw_magnitude(draw, tensors, options, "step_size", step, shape)
    epsilon = draw.choice((0.0, size, 0.1 * size, 3 * size, draw.size(1e-30, 1e30)), (1, 3, 3, 2, 1))
    # an l2 ball has one radius for its group
    forms = {"token": 4, "sequence": 3, "batch": 2}[options["level"]] if options["norm"] == "l2" else 4
    _draw_magnitude(draw, tensors, options, "epsilon", epsilon, shape, forms)


def _draw_gradient(draw: Draw, tensors: Tensors, options: dict, shape, dtype, kept: Tensor) -> None:
    """Of any size, but so that a raw step stays finite in fp32; some tokens are zero, subnormal or not finite."""
    raw = options["normalize"] == "none"
    sizes = (1.0, 1.0, draw.size(1e-6, 1e3)) if raw else (1.0, 1e-12, draw.size(1e-37, 1e37))
    grad = draw.choice(sizes) * draw.normal(*shape)
    for _ in range(draw.choice((0, 1, 3))):
        if grad.numel() == 0:
            break
        token = draw.integer(0, shape[0] - 1), draw.integer(0, shape[1] - 1)
        how = draw.choice(("zero", "subnormal", "nan", "infinite", "smaller"))
        if how == "smaller":
            grad[token] *= 1e-6
        elif how in ("zero", "subnormal"):
            grad[token] = 0.0 if how == "zero" else 2.0**-130
        else:
            grad[token][draw.integer(0, shape[2] - 1)] = torch.nan if how == "nan" else draw.choice((1, -1)) * torch.inf
    grad[~kept] = draw.choice((0.0, torch.nan, 1e30))
    grad_dtype = draw.choice((torch.float32, dtype, torch.float64))
    if grad_dtype == torch.bfloat16:  # whose subnormal numbers Triton's interpreter reads as zero
        grad[grad.abs() < 2.0**-126] = 0.0
    grad = grad.to(torch.float32).double()  # what the kernels are given, also of a float64 gradient
    tensors["grad"] = draw.lay(grad, grad_dtype, expand=False)


def run(op: str, tensors: Tensors, options: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """What the call returns, and the gradient of the perturbed embeddings for an upstream of their own."""
    given = {name: None if one is None else one.tensor for name, one in tensors.items()}
    embeds = given.pop("embeds").detach().requires_grad_()
    arguments = (embeds,) if op == "noise_init" else (embeds, given.pop("grad"), given.pop("delta", None))
    function = noise_init if op == "noise_init" else projected_ascent
    returned = function(*arguments, **given, **options, backend=backend)
    returned = returned if isinstance(returned, tuple) else (returned,)
    upstream = torch.linspace(-1, 1, embeds.numel()).to(embeds.dtype).view(embeds.shape)
    (gradient,) = torch.autograd.grad(returned[0], embeds, upstream)
    names = ["perturbed"] + ["delta"] * options["return_delta"] + ["stats"] * options.get("return_stats", False)
    results = {name: x.detach() for name, x in zip(names, returned, strict=True)}
    return {**results, "grad_embeds": gradient, "upstream": upstream}


def check(op: str, tensors: Tensors, options: dict[str, Any], results: dict[str, Tensor], judge: Judgement) -> None:
    """Judge what :func:`run` gave."""
    embeds, mask = tensors["embeds"].tensor, tensors["mask"]
    kept = torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.tensor != 0
    judge.exactly("gradient of embeds", results["grad_embeds"], results["upstream"])
    perturbed = results["perturbed"]
    judge.exactly("perturbed where masked", perturbed[~kept], embeds[~kept])
    wide = torch.promote_types(embeds.dtype, torch.float32)
    delta, error = (None, 0.0)
    if "delta" not in tensors:
        delta, error = _noise(tensors, options, embeds.shape, wide)
    else:
        delta = tensors["delta"].tensor.double()
    delta = torch.where(kept.unsqueeze(-1), delta, 0)
    if op == "noise_init":
        want, tolerance = delta, error
        bound = None
    else:
        want, tolerance, bound = _check_ascent(tensors, options, results, delta, error, kept, judge)
    if "delta" in results:
        moved = results["delta"]
        judge.require(moved.dtype == wide, f"delta: {moved.dtype} instead of {wide}")
        judge.require((moved[~kept] == 0).all(), "delta where masked: not zero")
        judge.within("delta", (moved.double() - want).abs(), torch.as_tensor(tolerance).expand(want.shape))
        judge.exactly("perturbed", perturbed, (embeds.to(wide) + moved).to(embeds.dtype))
        if bound is not None:
            judge.require((moved.abs() <= bound).all(), "delta: outside of the ball")
    else:
        total, size = embeds.to(wide).double() + want, embeds.double().abs() + want.abs()
        regular = total.isfinite() & (total.abs() < torch.finfo(embeds.dtype).max / 2)
        room = tolerance + torch.finfo(embeds.dtype).eps * size + torch.finfo(embeds.dtype).tiny
        judge.within("perturbed", (perturbed.double() - total).abs()[regular], room[regular])


def _magnitude(tensors: Tensors, options: dict[str, Any], name: str, shape, default: float = 1e-5) -> Tensor:
    """(B, S, 1) float64 values, as fp32 holds them."""
    value = tensors[name].tensor if tensors.get(name) is not None else options.get(name, default)
    value = value.double() if isinstance(value, Tensor) else torch.tensor(float(np.float32(value))).double()
    value = value.unsqueeze(1) if value.dim() == 1 else value
    return value.expand(shape[:2]).unsqueeze(-1)


def _noise(tensors: Tensors, options: dict[str, Any], shape, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """delta_0 by its definition, and how far a kernel's may lie from it."""
    seed = tensors["seed"].tensor.item() if "seed" in tensors else options["seed"]
    noise = oracle.unit_noise(tuple(shape), seed, options["distribution"], options["stream"], options["sample_offset"])
    std = _magnitude(tensors, options, "std", shape)
    if wide == torch.float64 and "std" in options:
        std = torch.full_like(std, options["std"])
    return noise * std, (1e-14 if wide == torch.float64 else NOISE_ERROR) * std + 2.0**-149


def _check_ascent(tensors, options, results, delta, error, kept, judge) -> tuple[Tensor, Tensor, Tensor | None]:
    """delta'', how far it may lie off, and the half-width of the linf ball; the statistics are judged here."""
    embeds, grad = tensors["embeds"].tensor, tensors["grad"].tensor
    wide = torch.promote_types(embeds.dtype, torch.float32)
    step, radius = (_magnitude(tensors, options, name, embeds.shape) for name in ("step_size", "epsilon"))
    if wide == torch.float64:
        step, radius = (
            torch.full_like(x, options[name]) if name in options else x
            for name, x in (("step_size", step), ("epsilon", radius))
        )
    arguments = {"step_size": step.squeeze(-1), "epsilon": radius.squeeze(-1), "mask": kept}
    choices = {name: options[name] for name in ("normalize", "level")}
    moved, _ = oracle.ascend(grad, delta, norm="none", **arguments, **choices)
    want, _ = oracle.ascend(grad, delta, norm=options["norm"], **arguments, **choices)
    place = 2.0**-24 if wide == torch.float32 else 2.0**-53
    rounding = ROUNDINGS * place * torch.maximum(delta.abs(), (moved - delta).abs()) + error
    shrunk = _shrinking(options, moved, radius)
    tolerance = rounding * shrunk + ROUNDINGS * place * want.abs() + 2.0**-149
    if options["norm"] == "l2" and wide == torch.float32:  # radius over norm may be subnormal
        tolerance = tolerance + moved.abs() * 2.0**-149
    if options["norm"] in ("l2", "linf_rescale"):  # the norm of the group is off by what its elements are
        tolerance = tolerance + want.abs() * _relative(rounding, moved, options["level"])
    if "stats" in results:
        _check_statistics(tensors, options, results, moved, rounding, radius, kept, judge)
    bound = radius.to(wide).expand(embeds.shape) if options["norm"] == "linf" else None
    return want, tolerance, bound


def _dims(level: str) -> tuple[int, ...]:
    return {"token": (2,), "sequence": (1, 2), "batch": (0, 1, 2)}[level]


def _largest(x: Tensor, level: str) -> Tensor:
    return x.abs().amax(_dims(level), keepdim=True) if x.numel() else x


def _length(x: Tensor, level: str) -> Tensor:
    """||x|| of each group, where squares may over- or underflow."""
    largest = _largest(x, level)
    safe = torch.where(largest > 0, largest, 1)
    return largest * ((x / safe) ** 2).sum(_dims(level), keepdim=True).sqrt() if x.numel() else x


def _shrinking(options: dict[str, Any], moved: Tensor, radius: Tensor) -> Tensor:
    """What the projection multiplies an element, and its error, by."""
    if options["norm"] == "linf_rescale":
        return 1 / (_largest(moved, options["level"]) + 1e-6)
    if options["norm"] != "l2":
        return torch.ones_like(moved)
    length = _length(moved, options["level"])
    return torch.where(length > radius, radius / torch.where(length > 0, length, 1), 1)


def _relative(rounding: Tensor, moved: Tensor, level: str) -> Tensor:
    """The largest relative error of a group's norm."""
    largest = _largest(moved, level)
    return 2 * _largest(rounding, level) / torch.where(largest > 0, largest, 1)


def _check_statistics(tensors, options, results, moved, rounding, radius, kept, judge) -> None:
    """||delta||^2 and what the dtype lost of the delta that was returned; clipped elements, but for the doubtful."""
    embeds, grad = tensors["embeds"].tensor, tensors["grad"].tensor
    stats = dict(zip(STATISTICS, results["stats"].unbind(-1), strict=True))
    judge.require(results["stats"].dtype == torch.float32, "stats: not fp32")
    non_finite = (~grad.to(torch.promote_types(embeds.dtype, torch.float32)).isfinite() & kept.unsqueeze(-1)).sum(-1)
    judge.exactly("stats, non-finite", stats["non_finite"], non_finite.float())
    if options["norm"] == "none":
        judge.require((stats["clipped"] == 0).all(), "stats, clipped: not zero")
    if options["norm"] == "linf":
        beyond = moved.abs() - radius
        least, most = ((beyond > rounding) & (moved != 0)).sum(-1), (beyond > -rounding).sum(-1)
        clipped = torch.where(kept, stats["clipped"], least)
        judge.require(((clipped >= least) & (clipped <= most)).all(), "stats, clipped: wrong count")
    judge.require((stats["clipped"][~kept] == 0).all(), "stats, clipped where masked: not zero")
    if "delta" not in results:
        return
    delta = results["delta"]
    lost = ((results["perturbed"] == embeds) & (delta != 0)).sum(-1)
    judge.exactly("stats, unrepresentable", stats["unrepresentable"], lost.float())
    squared = (delta.double() ** 2).sum(-1)
    regular = (squared < 3e38) & ((squared > 1e-30) | (squared == 0))
    error = (stats["delta_squared"].double() - squared).abs()
    judge.within("stats, squared", error[regular], 4e-6 * squared[regular])
