"""``noise_init`` against its definition, on every backend."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alum_kernels import noise_init
from alum_kernels.backends.reference import noise_init as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Known answers of Philox4x32-10 from the Random123 distribution: (counter, key, words).
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
SEEDS = (0, 1, 2**63 - 1, -1, -(2**63), 0x299F31D0A4093822)


def unit(place, shape, seed, **options) -> torch.Tensor:
    """delta_0 of scale one, fp32."""
    embeds = torch.zeros(shape, device=place.device)
    _, delta = noise_init(embeds, std=1.0, seed=seed, return_delta=True, backend=place.backend, **options)
    return delta.cpu()


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    seed = key[1] << 32 | key[0]
    drawn = reference.philox(
        torch.tensor(seed - 2**64 if seed >= 2**63 else seed), tuple(torch.tensor(x) for x in counter)
    )
    assert tuple(int(x) for x in drawn) == words
    assert tuple(oracle.philox(seed, np.array(counter, dtype=np.uint64)).tolist()) == words


@pytest.mark.parametrize("seed", SEEDS)
def test_words_are_equal_on_every_backend(place, seed):
    """Uniform noise of half-width one is an exact image of the 23 bits that are used of each word."""
    options = {"distribution": "uniform", "stream": 2**32 - 1, "sample_offset": 2**32 - 2}
    drawn = unit(place, (4, 2, 37), seed, **options)
    assert torch.equal(drawn.double(), oracle.unit_noise((4, 2, 37), seed, **options))


@pytest.mark.parametrize("seed", SEEDS[-2:])
def test_normals_agree_with_float64(place, seed):
    shape = (1, 2, 1031) if place.interpreted else (8, 64, 1031)
    drawn = unit(place, shape, seed, stream=1, sample_offset=5)
    assert (drawn.double() - oracle.unit_noise(shape, seed, stream=1, sample_offset=5)).abs().max() <= 1e-6


def test_distribution_has_its_moments(compiled_place):
    normal = unit(compiled_place, (16, 64, 256), 3).double()
    uniform = unit(compiled_place, (16, 64, 256), 3, distribution="uniform").double()
    bound = 5 / normal.numel() ** 0.5  # five standard errors of a mean of unit variance
    assert normal.mean().abs() < bound
    assert abs((normal**2).mean() - 1) < bound * 2**0.5
    assert abs((normal**4).mean() - 3) < bound * 96**0.5
    assert uniform.mean().abs() < bound
    assert abs((uniform**2).mean() - 1 / 3) < bound
    assert uniform.abs().max() < 1


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_result_is_the_sum_rounded_once(place, dtype, distribution):
    embeds = torch.randn(2, 2, 37, generator=torch.Generator().manual_seed(0)).to(place.device, dtype)
    before = embeds.clone()
    perturbed, delta = noise_init(
        embeds, std=0.37, seed=11, distribution=distribution, return_delta=True, backend=place.backend
    )
    want = 0.37 * oracle.unit_noise((2, 2, 37), 11, distribution)
    assert perturbed.dtype == dtype
    assert delta.dtype == torch.float32
    assert (delta.cpu().double() - want).abs().max() <= 0.5e-6
    assert torch.equal(perturbed, (embeds.float() + delta).to(dtype))
    assert torch.equal(perturbed, noise_init(embeds, std=0.37, seed=11, distribution=distribution,
                                             backend=place.backend))  # fmt: skip
    assert torch.equal(embeds, before)


def test_float64_is_served_by_the_reference():
    embeds = torch.randn(2, 3, 6, dtype=torch.float64)
    perturbed, delta = noise_init(embeds, std=0.5, seed=4, return_delta=True)
    want = 0.5 * oracle.unit_noise((2, 3, 6), 4)
    assert perturbed.dtype == delta.dtype == torch.float64
    torch.testing.assert_close(delta, want, rtol=0, atol=1e-14)
    assert torch.equal(perturbed, embeds + delta)


@pytest.mark.parametrize("form", ["scalar", "sample", "token", "strided", "expanded"])
def test_std_per_sequence_and_token(place, form):
    batch, length, hidden = 2, 3, 9
    table = torch.rand(batch, 2 * length, generator=torch.Generator().manual_seed(1)).to(place.device)
    std = {
        "scalar": table[0, 0],
        "sample": table[:, 1],
        "token": table[:, :length].contiguous(),
        "strided": table[:, ::2],
        "expanded": table[:, :1].expand(batch, length),
    }[form]
    drawn = noise_init(
        torch.zeros(batch, length, hidden, device=place.device), std=std, seed=2, return_delta=True,
        backend=place.backend,
    )[1]  # fmt: skip
    each = std.cpu().double()
    each = each.unsqueeze(1) if each.dim() == 1 else each
    want = oracle.unit_noise((batch, length, hidden), 2) * each.expand(batch, length).unsqueeze(-1)
    assert (drawn.cpu().double() - want).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("transposed", [False, True])
def test_masked_positions_are_untouched(place, dtype, transposed):
    embeds = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(2)).to(place.device)
    mask = torch.tensor([[1, 0], [0, 0], [1, 1]], device=place.device).to(dtype)
    if transposed:
        mask = mask.t().contiguous().t()
    perturbed, delta = noise_init(embeds, std=0.1, seed=3, mask=mask, return_delta=True, backend=place.backend)
    everywhere = noise_init(embeds, std=0.1, seed=3, backend=place.backend)
    kept = (mask != 0).unsqueeze(-1)
    assert torch.equal(perturbed, torch.where(kept, everywhere, embeds))
    assert (delta[(mask == 0)] == 0).all()
    assert (delta[(mask != 0)] != 0).all()


def test_splitting_and_padding_a_batch_changes_nothing(place):
    whole = unit(place, (3, 2, 22), 9, sample_offset=100)
    parts = [unit(place, (n, 2, 22), 9, sample_offset=100 + first) for first, n in ((0, 1), (1, 2))]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole, unit(place, (4, 3, 22), 9, sample_offset=100)[:3, :2])
    assert torch.equal(whole[..., :19], unit(place, (3, 2, 19), 9, sample_offset=100))


def test_seeds_streams_and_samples_differ(place):
    drawn = [unit(place, (1, 2, 64), seed, stream=stream, sample_offset=offset)
             for seed, stream, offset in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (1 << 32, 0, 0))]  # fmt: skip
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert (first == second).float().mean() < 0.05
    assert torch.equal(drawn[3], unit(place, (2, 2, 64), 1)[1:])


def test_seed_may_be_a_number_a_tensor_or_drawn(place):
    embeds = torch.zeros(1, 2, 8, device=place.device)
    of_number = noise_init(embeds, seed=77, backend=place.backend)
    for shape in ((), (1,), (1, 1)):
        seed = torch.full(shape, 77, dtype=torch.int64, device=place.device)
        assert torch.equal(of_number, noise_init(embeds, seed=seed, backend=place.backend))
        assert (seed == 77).all()
    torch.manual_seed(5)
    first, second = (noise_init(embeds, backend=place.backend) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, noise_init(embeds, backend=place.backend))
    assert not torch.equal(first, second)


def test_any_layout_of_embeddings(place):
    dense = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(3)).to(place.device)
    wanted = noise_init(dense, std=0.2, seed=1, backend=place.backend)
    layouts = {
        "transposed": dense.transpose(0, 2).contiguous().transpose(0, 2),
        "sliced": torch.cat((dense, dense), -1)[..., :8],
        "permuted": dense.permute(1, 0, 2).contiguous().permute(1, 0, 2),
    }
    for name, embeds in layouts.items():
        assert not embeds.is_contiguous()
        assert torch.equal(noise_init(embeds, std=0.2, seed=1, backend=place.backend), wanted), name
    expanded = dense[:1, :1].expand(2, 3, 8)
    wanted = noise_init(expanded.contiguous(), std=0.2, seed=1, backend=place.backend)
    assert torch.equal(noise_init(expanded, std=0.2, seed=1, backend=place.backend), wanted)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_tensors(place, shape):
    embeds = torch.zeros(shape, device=place.device, requires_grad=True)
    perturbed, delta = noise_init(embeds, seed=1, return_delta=True, backend=place.backend)
    assert perturbed.shape == delta.shape == shape
    perturbed.sum().backward()
    assert embeds.grad.shape == shape


def test_gradient_is_the_identity(place):
    embeds = torch.randn(2, 3, 8, device=place.device, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], device=place.device)
    upstream = torch.randn(2, 3, 8, device=place.device)
    perturbed, delta = noise_init(embeds, std=0.3, seed=1, mask=mask, return_delta=True, backend=place.backend)
    assert not delta.requires_grad
    perturbed.backward(upstream)
    assert torch.equal(embeds.grad, upstream)


def test_non_finite_embeddings_stay_where_they_are(place):
    embeds = torch.zeros(2, 2, 5, device=place.device)
    embeds[0, 0, 1], embeds[1, 1, 4] = float("nan"), float("inf")
    perturbed = noise_init(embeds, std=0.1, seed=1, backend=place.backend)
    assert perturbed[0, 0, 1].isnan()
    assert perturbed[1, 1, 4] == float("inf")
    assert int(perturbed.isfinite().sum()) == 18


@settings(max_examples=15)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40)),
    seed=st.integers(-(2**63), 2**63 - 1),
    stream=st.integers(0, 2**32 - 1),
    sample_offset=st.integers(0, 2**40),
    distribution=st.sampled_from(("normal", "uniform")),
    std=st.sampled_from((0.0, 1e-38, 1e-5, 1.0, 1e30)),
)
def test_any_counter(place, shape, seed, stream, sample_offset, distribution, std):
    embeds = torch.zeros(shape, device=place.device)
    _, delta = noise_init(
        embeds, std=std, seed=seed, stream=stream, sample_offset=sample_offset, distribution=distribution,
        return_delta=True, backend=place.backend,
    )  # fmt: skip
    want = std * oracle.unit_noise(shape, seed, distribution, stream, sample_offset)
    assert (delta.cpu().double() - want).abs().max() <= 1.1e-6 * std + 2.0**-149
