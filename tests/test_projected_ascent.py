"""``projected_ascent`` against its definition, one group at a time in float64, on every backend."""

import itertools

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alum_kernels import noise_init, projected_ascent
from alum_kernels.ops.projected_ascent import LEVELS, NORMALIZE, NORMS, STATISTICS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS = 6
"""An element goes through at most this many fp32 roundings, besides those of a sum."""


def inputs(
    shape: tuple[int, int, int],
    device: str,
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype = torch.float32,
    size: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, gradient and perturbation, with a first token whose gradient is zero."""
    generator = torch.Generator().manual_seed(sum(shape))
    embeds = torch.randn(shape, generator=generator).to(device, dtype)
    grad = size * torch.randn(shape, generator=generator)
    grad[:1, :1] = 0
    return embeds, grad.to(device, grad_dtype), 0.3 * torch.randn(shape, generator=generator).to(device)


def check_against_oracle(
    place, embeds: Tensor, grad: Tensor, delta: Tensor, *, mask: Tensor | None = None, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """Run on ``place`` and compare everything that is returned; returns it."""
    before = [t.clone() for t in (embeds, grad, delta)]
    perturbed, moved, stats = projected_ascent(
        embeds, grad, delta, mask=mask, return_delta=True, return_stats=True, backend=place.backend, **options
    )
    want, clipped = oracle.ascend(grad, delta, mask=mask, **options)
    # the rounding error of an element is relative to what was added up in it: delta and the step
    if want.numel():
        largest = max(float(delta.abs().max()), float(want.abs().max()))
        assert float((moved.cpu().double() - want).abs().max()) <= ROUNDINGS * 2.0**-24 * largest
    assert perturbed.dtype == embeds.dtype
    assert moved.dtype == stats.dtype == torch.float32
    assert torch.equal(perturbed, (embeds.float() + moved).to(embeds.dtype))
    kept = torch.ones_like(embeds[..., 0], dtype=torch.bool) if mask is None else mask != 0
    assert (moved[~kept] == 0).all()
    assert torch.equal(perturbed[~kept], embeds[~kept])
    lost = ((perturbed == embeds) & (moved != 0)).sum(-1)
    non_finite = torch.where(kept.unsqueeze(-1), ~grad.isfinite(), False).sum(-1)
    stats, named = stats.cpu(), dict(zip(STATISTICS, stats.cpu().unbind(-1), strict=True))
    torch.testing.assert_close(named["delta_squared"], (moved.double() ** 2).sum(-1).float().cpu(), rtol=2e-6, atol=0)
    assert torch.equal(named["clipped"], clipped.float())
    assert torch.equal(named["unrepresentable"], lost.float().cpu())
    assert torch.equal(named["non_finite"], non_finite.float().cpu())
    for tensor, copy in zip((embeds, grad, delta), before, strict=True):
        assert torch.equal(tensor.nan_to_num(7.0), copy.nan_to_num(7.0))
    return perturbed, moved, stats


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("norm", NORMS)
def test_every_choice(place, norm, normalize, level):
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], device=place.device)
    embeds, grad, delta = inputs((3, 4, 19), place.device)
    check_against_oracle(
        place, embeds, grad, delta, step_size=0.25, epsilon=0.5, norm=norm, normalize=normalize, level=level, mask=mask
    )


@pytest.mark.parametrize("grad_dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(place, dtype, grad_dtype):
    embeds, grad, delta = inputs((2, 2, 33), place.device, dtype, grad_dtype)
    check_against_oracle(place, embeds, grad, delta, step_size=0.25, epsilon=0.4, normalize="l2", norm="linf")


@pytest.mark.parametrize(("norm", "normalize"), [("linf", "l2"), ("l2", "linf"), ("linf_rescale", "sign")])
@pytest.mark.parametrize("level", LEVELS)
def test_real_sizes(compiled_place, level, norm, normalize):
    embeds, grad, delta = inputs((4, 64, 768), compiled_place.device)
    mask = torch.arange(64, device=compiled_place.device) < torch.tensor(
        [[64], [17], [1], [40]], device=compiled_place.device
    )
    check_against_oracle(
        compiled_place, embeds, grad, delta, step_size=3.0, epsilon=0.5, norm=norm, normalize=normalize, level=level,
        mask=mask,
    )  # fmt: skip


@pytest.mark.parametrize("hidden", [1, 3, 4, 5, 2049])
def test_widths_around_vectors_and_tiles(place, hidden):
    embeds, grad, delta = inputs((1, 2, hidden), place.device)
    check_against_oracle(place, embeds, grad, delta, step_size=0.1, epsilon=0.2, norm="l2", normalize="l2")


@pytest.mark.parametrize("size", [1e-42, 1e-37, 1e-30, 1e-12, 1e12, 1e30, 1e38])
@pytest.mark.parametrize("normalize", ["linf", "l2", "sign"])
def test_gradient_of_any_size_gives_the_same_step(place, normalize, size):
    """No square under- or overflows; a subnormal gradient is no direction and takes no step."""
    embeds, grad, delta = inputs((2, 2, 9), place.device)
    grad = (grad.clamp(-3, 3) * size).nan_to_num()
    _, moved, _ = check_against_oracle(
        place, embeds, grad, delta, step_size=0.25, epsilon=10.0, normalize=normalize, level="sequence"
    )
    assert torch.equal(moved, delta) == (size < 2.0**-126)


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("norm", ["l2", "linf_rescale"])
def test_perturbation_of_any_size_is_projected(place, norm, size):
    embeds, grad, delta = inputs((2, 2, 9), place.device)
    check_against_oracle(
        place, embeds, grad, delta * size, step_size=0.0, epsilon=0.1 * size, norm=norm, level="sequence"
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_group_without_a_direction_is_projected_only(place, normalize, value, level):
    embeds, grad, delta = inputs((2, 2, 7), place.device)
    if value == 0:
        grad[0, 1] = 0
    grad[0, 1, 3] = value
    _, moved, stats = check_against_oracle(
        place, embeds, grad, delta, step_size=0.25, epsilon=0.2, norm="linf", normalize=normalize, level=level
    )
    assert torch.equal(moved[0, 1], delta[0, 1].clamp(-0.2, 0.2))
    assert float(stats[0, 1, 3]) == (value != 0)
    assert moved.isfinite().all()


def test_masked_gradient_counts_in_no_norm(place):
    embeds, grad, delta = inputs((2, 3, 8), place.device)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], device=place.device)
    clean = check_against_oracle(
        place, embeds, grad, delta, step_size=0.25, epsilon=0.3, norm="l2", normalize="l2", level="batch", mask=mask
    )
    grad[mask == 0], delta[mask == 0] = float("nan"), 1e30
    spoilt = projected_ascent(
        embeds, grad, delta, step_size=0.25, epsilon=0.3, norm="l2", normalize="l2", level="batch", mask=mask,
        return_delta=True, return_stats=True, backend=place.backend,
    )  # fmt: skip
    assert torch.equal(clean[0], spoilt[0])
    assert torch.equal(clean[1], spoilt[1])
    assert torch.equal(clean[2], spoilt[2].cpu())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_mask_of_any_integer_dtype_and_layout(place, dtype):
    embeds, grad, delta = inputs((3, 2, 5), place.device)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]], device=place.device).to(dtype).t()
    assert not mask.is_contiguous()
    check_against_oracle(place, embeds, grad, delta, step_size=0.25, epsilon=0.3, normalize="l2", mask=mask)


@pytest.mark.parametrize(("distribution", "level"), [("normal", "token"), ("uniform", "sequence"), ("normal", "batch")])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_seed_draws_the_perturbation_of_noise_init_again(place, norm, distribution, level):
    embeds, grad, _ = inputs((2, 3, 21), place.device)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]], device=place.device)
    noise = {"std": torch.tensor([0.1, 0.4], device=place.device), "distribution": distribution, "stream": 3,
             "sample_offset": 2**32 - 1, "seed": 12, "backend": place.backend}  # fmt: skip
    options = {"step_size": 0.2, "epsilon": 0.3, "norm": norm, "normalize": "l2", "level": level, "mask": mask,
               "return_delta": True, "return_stats": True}  # fmt: skip
    _, delta = noise_init(embeds, mask=mask, return_delta=True, **noise)
    given_seed = projected_ascent(embeds, grad, **noise, **options)
    given_delta = projected_ascent(embeds, grad, delta, backend=place.backend, **options)
    for first, second in zip(given_seed, given_delta, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("form", ["scalar", "sample", "token", "strided"])
def test_magnitudes_as_tensors(place, form):
    embeds, grad, delta = inputs((2, 3, 6), place.device)
    table = 0.1 + torch.rand(2, 6, generator=torch.Generator().manual_seed(4)).to(place.device)
    shaped = {
        "scalar": table[0, 0],
        "sample": table[:, 2],
        "token": table[:, 3:].contiguous(),
        "strided": table[:, ::2],
    }
    for norm in ("linf", "l2"):
        check_against_oracle(
            place, embeds, grad, delta, step_size=shaped[form], epsilon=shaped[form], norm=norm, normalize="l2",
            level="token",
        )  # fmt: skip


def test_number_and_tensor_magnitudes_agree(place):
    embeds, grad, delta = inputs((2, 2, 6), place.device)
    of_numbers = projected_ascent(embeds, grad, delta, step_size=0.25, epsilon=0.375, backend=place.backend)
    tensors = (torch.tensor(value, device=place.device) for value in (0.25, 0.375))
    step_size, epsilon = tensors
    of_tensors = projected_ascent(embeds, grad, delta, step_size=step_size, epsilon=epsilon, backend=place.backend)
    assert torch.equal(of_numbers, of_tensors)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_radius_that_is_nan_gives_nan(place, norm):
    embeds, grad, delta = inputs((2, 3, 9), place.device)
    radius = torch.tensor([[0.1, float("nan"), 0.1]], device=place.device).expand(2, 3)
    moved = projected_ascent(
        embeds, grad, delta, step_size=0.1, epsilon=radius, norm=norm, level="token", backend=place.backend
    )
    assert moved.isnan().all(-1).tolist() == [[False, True, False]] * 2


@pytest.mark.parametrize(("level", "shape"), [
    ("token", (1, 2, 65_537)), ("sequence", (2, 65, 1025)), ("batch", (5, 13, 1025)),
])  # fmt: skip
def test_many_equal_squares_have_the_right_sum(place, level, shape):
    """The square of 0.1 and its multiples are rounded; one after the other, all would be in the same direction."""
    embeds = torch.zeros(shape, device=place.device)
    _, moved, stats = projected_ascent(
        embeds, torch.ones_like(embeds), embeds, step_size=0.1, epsilon=1.0, norm="l2", normalize="sign", level=level,
        return_delta=True, return_stats=True, backend=place.backend,
    )  # fmt: skip
    members = {"token": shape[2], "sequence": shape[1] * shape[2], "batch": embeds.numel()}[level]
    size = members**-0.5
    assert float((moved.double() - size).abs().max()) <= 8 * 2.0**-24 * size
    squared = (moved.double() ** 2).sum(-1)
    assert float(((stats[..., 0].double() - squared) / squared).abs().max()) <= 16 * 2.0**-24


def test_stats_count_what_the_embedding_dtype_loses(place):
    embeds = torch.ones(1, 2, 8, dtype=torch.bfloat16, device=place.device)
    delta = torch.full((1, 2, 8), 1e-5, device=place.device)
    delta[0, 1, :3] = 0.5
    _, _, stats = check_against_oracle(place, embeds, torch.zeros_like(delta), delta, step_size=0.0, epsilon=1.0)
    assert stats[0, :, 2].tolist() == [8.0, 5.0]


def test_float64_is_served_by_the_reference():
    embeds, grad, delta = (t.double() for t in inputs((2, 3, 7), "cpu"))
    for norm, normalize, level in itertools.product(NORMS, NORMALIZE, LEVELS):
        options = {"step_size": 0.3, "epsilon": 0.4, "norm": norm, "normalize": normalize, "level": level}
        perturbed, moved = projected_ascent(embeds, grad, delta, return_delta=True, **options)
        want, _ = oracle.ascend(grad, delta, **options)
        torch.testing.assert_close(moved, want, rtol=1e-14, atol=1e-15)
        assert torch.equal(perturbed, embeds + moved)


def test_what_is_returned(place):
    embeds, grad, delta = inputs((1, 2, 4), place.device)
    call = {"step_size": 0.1, "epsilon": 0.1, "backend": place.backend}
    alone = projected_ascent(embeds, grad, delta, **call)
    assert isinstance(alone, Tensor)
    both = projected_ascent(embeds, grad, delta, return_delta=True, **call)
    stats = projected_ascent(embeds, grad, delta, return_stats=True, **call)
    assert [t.shape for t in both] == [embeds.shape, embeds.shape]
    assert [t.shape for t in stats] == [embeds.shape, (1, 2, 4)]
    assert torch.equal(alone, both[0])
    assert torch.equal(alone, stats[0])


def test_gradient_is_the_identity(place):
    embeds, grad, delta = (t.requires_grad_() for t in inputs((2, 2, 5), place.device))
    upstream = torch.randn(2, 2, 5, device=place.device)
    perturbed, moved, stats = projected_ascent(
        embeds, grad, delta, step_size=0.1, epsilon=0.1, return_delta=True, return_stats=True, backend=place.backend
    )
    assert not moved.requires_grad
    assert not stats.requires_grad
    perturbed.backward(upstream)
    assert torch.equal(embeds.grad, upstream)
    assert grad.grad is None
    assert delta.grad is None


def test_any_layout(place):
    tensors = inputs((3, 2, 8), place.device)
    options = {"step_size": 0.1, "epsilon": 0.3, "normalize": "l2"}
    for dims in ((0, 1), (0, 2), (1, 2)):
        strided = [t.transpose(*dims).contiguous().transpose(*dims) for t in tensors]
        assert not any(t.is_contiguous() for t in strided)
        check_against_oracle(place, *strided, **options)
    check_against_oracle(place, *(t[:1].expand(3, 2, 8) for t in tensors), **options)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_tensors(place, shape, level):
    empty = torch.zeros(shape, device=place.device)
    perturbed, moved, stats = projected_ascent(
        empty, empty, empty, step_size=0.1, epsilon=0.1, norm="l2", normalize="l2", level=level, return_delta=True,
        return_stats=True, backend=place.backend,
    )  # fmt: skip
    assert perturbed.shape == moved.shape == shape
    assert stats.shape == (*shape[:2], 4)
    assert (stats == 0).all()


def test_two_calls_are_bitwise_equal(compiled_place):
    embeds, grad, delta = inputs((8, 33, 257), compiled_place.device)
    options = {"step_size": 0.3, "epsilon": 0.4, "norm": "l2", "normalize": "l2", "return_delta": True,
               "return_stats": True, "backend": compiled_place.backend}  # fmt: skip
    for level in LEVELS:
        first, second = (projected_ascent(embeds, grad, delta, level=level, **options) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@settings(max_examples=12)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 70)),
    norm=st.sampled_from(NORMS),
    normalize=st.sampled_from(NORMALIZE),
    level=st.sampled_from(LEVELS),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from((1e-20, 1e-3, 1.0, 1e3)),
    step_size=st.sampled_from((0.0, 1e-5, 0.5)),
    epsilon=st.sampled_from((0.0, 1e-5, 0.25)),
    masked=st.integers(0, 2**9 - 1),
)
def test_any_call(place, shape, norm, normalize, level, dtype, size, step_size, epsilon, masked):
    embeds, grad, delta = inputs(shape, place.device, dtype, size=size if normalize != "none" else 1.0)
    tokens = shape[0] * shape[1]
    mask = torch.tensor([(masked >> i) & 1 for i in range(tokens)], device=place.device).view(shape[:2])
    check_against_oracle(
        place, embeds, grad, delta, step_size=step_size, epsilon=epsilon, norm=norm, normalize=normalize, level=level,
        mask=mask,
    )  # fmt: skip
