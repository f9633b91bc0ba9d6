"""The CUDA kernels, executed on the CPU: every phase, barrier and index of them, against the reference in float64.

Each call is repeated in several orders of the threads between barriers, which a kernel without races does not notice.
Here the emulation itself, noise and the ascent; divergences in test_cuda_divergences_on_host.py.
"""

import itertools

import pytest
import torch
from cuda_emulation.checks import DTYPES, bits, generator, on_every_device
from cuda_emulation.emulated import Device, surrounded
from torch import Tensor

from alum_kernels.backends.reference import noise_init as reference_noise
from alum_kernels.backends.reference import projected_ascent as reference_ascent
from alum_kernels.ops.projected_ascent import LEVELS, NORMALIZE, NORMS


def a_seed(value: int = 0x1234_5678_9ABC_DEF0) -> Tensor:
    return torch.tensor([value], dtype=torch.int64)


def a_mask(batch: int, length: int) -> Tensor:
    return torch.rand(batch, length, generator=generator(3)) > 0.3


# ---- the emulation itself ----


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("barrier_in_a_branch", "a block diverges .* at __syncthreads, thread 32 is at its end"),
        ("two_barriers", "a block diverges .* elsewhere"),
        ("shuffle_in_a_branch", "a warp diverges"),
        ("grid_barrier", "not cooperative"),
        ("grid_barrier_in_a_branch", "the grid diverges"),
        ("cluster_barrier", "without clusters"),
        ("cluster_barrier_in_a_branch", "a cluster diverges .* at cluster.sync, thread 0 is at its end"),
        ("sibling_not_begun", "a sibling that need not have begun"),
        ("sibling_ended", "a sibling that may have ended"),
        ("sibling_beyond", "a sibling: byte 256 of 256 was asked for"),
        ("sibling_overrun", "shared memory: byte 256 of 256 was written"),
        ("beyond_shared", "shared memory: byte 256 of 256 was written"),
        ("misaligned", r"misuse.cu:\d+: misaligned access"),
        ("large", "kernel launch: invalid argument"),
    ],
)
def test_misuse_is_noticed(cuda, kind, message):
    cuda.on(Device(capability=90))
    with pytest.raises(RuntimeError, match=message):
        cuda.misuse(kind)


def test_clusters_need_a_device_that_has_them(cuda):
    cuda.on(Device(capability=89))
    with pytest.raises(RuntimeError, match="kernel launch: cluster misconfiguration"):
        cuda.misuse("sibling_beyond")


def test_a_race_shows_between_orders(cuda):
    ascending, descending = (cuda.on(Device(order=order)).misuse("race") for order in ("ascending", "descending"))
    assert ascending[:32].isnan().all()  # shared memory that nobody has written yet
    assert torch.equal(ascending[32:], torch.arange(32.0))
    assert not torch.equal(ascending[32:], descending[32:])


def test_a_copy_that_nobody_waited_for_shows(cuda):
    assert cuda.on(Device()).misuse("copy_not_waited_for").isnan().all()


# ---- noise ----


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 3, 4, 5, 130])
def test_noise(cuda, distribution, dtype, hidden):
    shape = (3, 7, hidden)
    options = {"mask": a_mask(3, 7), "distribution": distribution, "stream": 1, "sample_offset": 2**32 - 2}
    embeds = torch.randn(shape, generator=generator(0)).to(dtype)
    for offset, std in ((0, 0.5), (1, torch.rand(3, 7, generator=generator(1))), (2, torch.rand(3, 1).expand(3, 7))):
        inputs = surrounded(embeds, offset)
        perturbed, delta = on_every_device(
            cuda,
            lambda: cuda.noise_init(inputs, a_seed(), std=std, output_offset=offset, **options),  # noqa: B023
        )
        _, expected = reference_noise.noise_init(embeds.double(), a_seed(), std=std, **options)
        scale = std.unsqueeze(-1) if isinstance(std, Tensor) else std
        assert ((delta - expected).abs() <= 1.01e-6 * scale).all()
        assert torch.equal(bits(perturbed), bits((embeds.float() + delta).to(dtype)))
        (alone,) = cuda.noise_init(inputs, a_seed(), std=std, return_delta=False, **options)
        assert torch.equal(bits(alone), bits(perturbed))


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_noise_where_the_mask_is_an_integer_with_strides(cuda, mask_dtype):
    cuda.on(Device())
    mask = a_mask(6, 4).to(mask_dtype).t()
    embeds = torch.zeros(4, 6, 8)
    _, delta = cuda.noise_init(embeds, a_seed(-5), std=1.0, mask=mask)
    assert torch.equal(delta.abs().sum(-1) > 0, mask != 0)


# ---- the ascent ----


def check_ascent(embeds, grad, delta, results, expected, options):
    """Results of the kernel on these inputs against the reference's, in float64."""
    perturbed, new_delta, statistics = results
    _, projected, counts = expected
    mask = options["mask"]
    kept = torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask != 0
    scale = torch.maximum(projected.abs().amax(-1), delta.double().abs().amax(-1))
    error = (new_delta - projected).abs().amax(-1)
    assert (error <= 2e-6 * scale)[kept].all(), (error / scale)[kept].max()
    assert torch.equal(bits(new_delta[~kept]), bits(torch.zeros_like(new_delta[~kept])))
    rounded = torch.where(kept.unsqueeze(-1), (embeds.float() + new_delta).to(embeds.dtype), embeds)
    assert torch.equal(bits(perturbed), bits(rounded))
    squared = (new_delta.double() ** 2).sum(-1)
    assert ((statistics[..., 0] - squared).abs() <= 1e-6 * squared).all()
    assert torch.equal(statistics[..., 1], counts[..., 1])
    lost = ((perturbed == embeds) & (new_delta != 0)).sum(-1)
    assert torch.equal(statistics[..., 2], lost.float())
    assert torch.equal(statistics[..., 3], counts[..., 3])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seeded", [False, True])
def test_ascent(cuda, norm, normalize, level, seeded):
    shape, draw = (4, 9, 37), generator(11)
    embeds, grad = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    grad[0, 3] = 0.0  # no step where the group is the token
    grad[0, 4, 5] = float("nan")  # masked, where the group is larger
    grad[1, 2] *= 1e25
    grad[2] *= 1e-30
    grad[3, 0, 0], grad[3, 0, 1] = float("inf"), -float("inf")  # a group without a step, unless it is the batch
    mask = torch.rand(shape[:2], generator=draw) > 0.2
    mask[0, 4] = level == "token"
    mask[3] = level != "batch"
    mask[1, 0], mask[2, 0] = True, False
    grad[2, 0], embeds[2, 0] = float("nan"), float("nan")
    step = 0.03 * (1 + torch.rand(shape[:2], generator=draw))
    if normalize == "none":
        step = step * grad.nan_to_num(0, 1, 1).abs().amax((1, 2), keepdim=True)[..., 0].clamp(1e-30).reciprocal()
    epsilon = 0.01 + 0.05 * torch.rand(shape[:2], generator=draw)
    if norm == "l2":
        epsilon = {"token": epsilon, "sequence": epsilon[:, :1].expand(shape[:2]), "batch": 0.25}[level]
    std = 0.02 * (1 + torch.rand(shape[:2], generator=draw))
    options = {
        "step_size": step,
        "epsilon": epsilon,
        "norm": norm,
        "normalize": normalize,
        "level": level,
        "mask": mask,
    }
    if seeded:
        noise = {"std": std, "distribution": "uniform", "stream": 1, "sample_offset": 5}
        _, delta = cuda.noise_init(embeds, a_seed(), **noise)
        start = {"seed": a_seed(), **noise}
    else:
        delta = std.unsqueeze(-1) * torch.randn(shape, generator=draw)
        start = {"delta": surrounded(delta)}
    inputs = surrounded(embeds), surrounded(grad)
    results = on_every_device(cuda, lambda: cuda.projected_ascent(*inputs, **start, **options))
    expected = reference_ascent.projected_ascent(embeds.double(), grad.double(), delta.double(), **options)
    check_ascent(embeds, grad, delta, results, expected, options)


@pytest.mark.parametrize("hidden", [1, 3, 5, 130, 132])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ascent_of_any_width_and_type(cuda, dtype, hidden):
    shape, draw = (2, 5, hidden), generator(12)
    embeds = torch.randn(shape, generator=draw).to(dtype)
    delta = 0.1 * torch.randn(shape, generator=draw)
    for level, offset, grad_dtype in itertools.product(LEVELS, (0, 1), {dtype, torch.float32}):
        grad = torch.randn(shape, generator=draw).to(grad_dtype)
        options = {"step_size": 0.25, "epsilon": 0.5, "norm": "l2", "normalize": "l2", "level": level, "mask": None}
        inputs = surrounded(embeds, offset), surrounded(grad, offset), surrounded(delta, offset)
        results = on_every_device(cuda, lambda: cuda.projected_ascent(*inputs, output_offset=offset, **options))  # noqa: B023
        expected = reference_ascent.projected_ascent(embeds.double(), grad.double(), delta.double(), **options)
        check_ascent(embeds, grad, delta, results, expected, options)
        (alone,) = cuda.projected_ascent(*inputs, return_more=False, **options)
        assert torch.equal(bits(alone), bits(results[0]))


@pytest.mark.parametrize("level", ["sequence", "batch"])
def test_ascent_of_groups_of_more_tokens_than_a_block_has_threads(cuda, level):
    shape, draw = (2, 300, 5), generator(13)
    embeds, grad, delta = (torch.randn(shape, generator=draw) for _ in range(3))
    grad[1] *= 100
    options = {
        "step_size": 0.5,
        "norm": "l2",
        "normalize": "l2",
        "level": level,
        "mask": a_mask(2, 300),
        "epsilon": 3.0,
    }
    results = on_every_device(cuda, lambda: cuda.projected_ascent(embeds, grad, delta, **options))
    expected = reference_ascent.projected_ascent(embeds.double(), grad.double(), delta.double(), **options)
    check_ascent(embeds, grad, delta, results, expected, options)


@pytest.mark.parametrize("level", LEVELS)
def test_ascent_of_a_gradient_below_every_normal_number(cuda, level):
    shape = (1, 3, 8)
    embeds, delta = torch.zeros(shape), torch.full(shape, 0.25)
    for grad, moves in ((torch.full(shape, 2.0**-127), False), (torch.full(shape, 2.0**-126), True)):
        options = {"step_size": 0.5, "epsilon": 1.0, "norm": "linf", "normalize": "sign", "level": level}
        (perturbed,) = cuda.on(Device()).projected_ascent(embeds, grad, delta, return_more=False, **options)
        assert torch.equal(perturbed, torch.full(shape, 0.75 if moves else 0.25))
