"""The CUDA kernels, executed on the CPU: every phase, barrier and index of them, against the reference in float64.

Each call is repeated in several orders of the threads between barriers, which a kernel without races does not notice.
"""

import dataclasses
import itertools
import shutil

import pytest
import torch
from cuda_emulation.emulated import Device, EmulatedCuda, compiled, surrounded
from torch import Tensor

from alum_kernels.backends.reference import noise_init as reference_noise
from alum_kernels.backends.reference import projected_ascent as reference_ascent
from alum_kernels.backends.reference import symmetric_kl as reference_kl
from alum_kernels.ops.projected_ascent import LEVELS, NORMALIZE, NORMS
from alum_kernels.ops.symmetric_kl import GRADIENTS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = (
    Device(),
    Device(order="descending", largest_grid=3, multiprocessors=1, blocks_per_multiprocessor=1),
    Device(order="shuffled", shuffle_seed=7, multiprocessors=3),
)
SMALLEST_NORMAL = torch.finfo(torch.float32).smallest_normal
UNSTAGED = 2624
"""Shared memory for the room of the reductions and nothing else."""


@pytest.fixture(scope="session")
def cuda(tmp_path_factory) -> EmulatedCuda:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    return compiled(compiler, tmp_path_factory.mktemp("cuda_emulation"))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def on_every_device(cuda: EmulatedCuda, call, **changes) -> tuple[Tensor | None, ...]:
    """What ``call()`` gives, the same to the last bit in every order of threads and for every size of the grid."""
    results = None
    for device in DEVICES:
        cuda.on(dataclasses.replace(device, **changes))
        again = call()
        results = again if results is None else results
        for first, other in zip(results, again, strict=True):
            assert first is None or torch.equal(bits(first), bits(other)), device
    return results


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


# ---- divergences ----

PERTURBATIONS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
KINDS = tuple(itertools.product((3.0, 8.0), (0.0, 24.0), PERTURBATIONS))
"""Size of the logits, what one class is raised by, and size of the perturbation."""


def hard_logits(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(1, rows, V) logits of KINDS, mixed where the rows are few."""
    draw = generator(seed)
    size, raised, change = torch.tensor(KINDS, dtype=torch.float64)[11 * torch.arange(rows) % len(KINDS)].T
    b = size[:, None] * torch.randn(rows, columns, generator=draw, dtype=torch.float64)
    top = torch.randint(columns, (rows,), generator=draw)
    b[torch.arange(rows), top] += raised
    b = b.to(dtype)
    a = b.double() + change[:, None] * torch.randn(rows, columns, generator=draw, dtype=torch.float64)
    return a.to(dtype)[None], b[None]


def rounding(dtype: torch.dtype) -> float:
    return 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2


def relative_errors(gradient: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative L2 error over the whole, and of the median row; rows without gradient count in neither."""
    error = (gradient.double() - expected).flatten(0, 1)
    expected = expected.flatten(0, 1)
    rows = expected.abs().amax(-1) > 0
    assert (error[~rows] == 0).all()
    if not rows.any():
        return 0.0, 0.0
    each = error[rows].norm(dim=-1) / expected[rows].norm(dim=-1)
    return (error.norm() / expected.norm()).item(), each.median().item()


def check_divergence(
    cuda, a, b, *, divergence, gradient="full", inv_temperature=1.0, value=None, limit=1e-5, **changes
):
    """All three kernels against the reference in float64, at the accuracy that the design demands."""
    columns, rows = a.shape[-1], a.shape[:2]
    value = (4e-6 if columns <= 64 else 1e-6) if value is None else value
    weight = 0.5 + torch.rand(rows, generator=generator(5))
    # the largest values of fp16 gradients stay normal
    weight = weight * 64 if a.dtype == torch.float16 else weight
    options = {"divergence": divergence, "inv_temperature": inv_temperature}
    expected, _ = reference_kl.loss(a.double(), b.double(), None, **options)
    loss, statistics = on_every_device(cuda, lambda: cuda.loss(a, b, **options), **changes)
    counted = expected >= SMALLEST_NORMAL
    assert (loss[~counted].abs() <= SMALLEST_NORMAL).all()
    assert (loss[expected == 0] == 0).all()
    worst = ((loss - expected).abs() / expected)[counted].max().item()
    assert worst <= value, worst

    options["gradient"] = gradient
    exact = reference_kl.gradient(a.double(), b.double(), weight.double(), **options)
    wants_b = exact[1] is not None
    sides = on_every_device(
        cuda, lambda: cuda.gradient(a, b, statistics, weight, wants_b=wants_b, **options), **changes
    )
    both_loss, both_a, both_b = cuda.loss_and_gradient(a, b, weight, wants_b=wants_b, **options)  # on the last device
    assert torch.equal(bits(both_loss), bits(loss))
    of_a, of_b = ((sides[0], exact[0]), (both_a, exact[0])), ((sides[1], exact[1]), (both_b, exact[1]))
    for side, wanted in (*of_a, *(of_b if wants_b else ())):
        whole, median = relative_errors(side, wanted)
        assert whole <= limit + rounding(a.dtype), whole
        if a.dtype != torch.float16:  # whose rows of 1e-6 are subnormal
            assert median <= limit + rounding(a.dtype), median
    return loss, statistics, *sides, both_a, both_b


@pytest.mark.parametrize("divergence", ["symmetric_kl", "kl"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [2, 3, 64, 65, 127, 129, 1000, 2048, 2056])
def test_divergence(cuda, columns, dtype, divergence):
    a, b = hard_logits(32 if columns <= 129 else 16, columns, dtype)
    check_divergence(cuda, surrounded(a), surrounded(b), divergence=divergence)


@pytest.mark.parametrize("columns", [2, 3])
def test_divergence_of_many_rows_of_few_classes(cuda, columns):
    check_divergence(cuda, *hard_logits(65536, columns), divergence="symmetric_kl")


@pytest.mark.parametrize(
    ("columns", "dtype"),
    [(20000, torch.float32), (30522, torch.float32), (50257, torch.bfloat16), (128256, torch.float32)],
)
def test_divergence_of_vocabularies(cuda, columns, dtype):
    check_divergence(cuda, *hard_logits(8, columns, dtype), divergence="symmetric_kl")


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("divergence", ["symmetric_kl", "kl"])
@pytest.mark.parametrize("columns", [3, 129, 2048])
def test_conventions_and_temperature(cuda, columns, divergence, gradient):
    a, b = hard_logits(16, columns, seed=1)
    options = {"divergence": divergence, "gradient": gradient}
    check_divergence(cuda, a, b, inv_temperature=0.4, **options)
    check_divergence(cuda, a, b, inv_temperature=2.0, **options)


@pytest.mark.parametrize("columns", [2, 64, 65, 1000, 4096])
def test_perturbations_of_fifty(cuda, columns):
    b = 3 * torch.randn(1, 24, columns, generator=generator(2))
    a = b + 50 * torch.randn(1, 24, columns, generator=generator(3))
    for divergence in ("symmetric_kl", "kl"):
        check_divergence(cuda, a, b, divergence=divergence, value=4e-6, limit=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [65, 128, 2056])
def test_staged_rows_are_the_rows_themselves(cuda, columns, dtype):
    a, b = hard_logits(10, columns, dtype, seed=2)
    for divergence in ("symmetric_kl", "kl"):
        staged = check_divergence(cuda, a, b, divergence=divergence)
        unstaged = check_divergence(cuda, a, b, divergence=divergence, shared_limit=UNSTAGED)
        for x, y in zip(staged, unstaged, strict=True):
            assert torch.equal(bits(x), bits(y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [3, 200])
def test_rows_anywhere_in_memory(cuda, columns, dtype):
    """Slices of a sequence, rows apart by a padded vocabulary, an odd distance or an odd address: none is copied."""
    a, b = (x.view(2, 4, columns) for x in hard_logits(8, columns, dtype, seed=3))
    for outer, pad, offset in ((1, 0, 0), (0, 24, 0), (2, 8, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2)):

        def placed(x):
            whole = torch.full((2, 4 + outer, columns + pad), float("nan"), dtype=dtype)  # noqa: B023
            inner = surrounded(whole, offset)[:, :4, :columns]  # noqa: B023
            return inner.copy_(x)

        check_divergence(cuda, placed(a), placed(b), divergence="symmetric_kl")
        check_divergence(cuda, placed(a), b, divergence="symmetric_kl")


@pytest.mark.parametrize("divergence", ["symmetric_kl", "kl"])
@pytest.mark.parametrize(
    ("columns", "shared_limit"),
    [*itertools.product((1, 2, 64, 65, 128, 2056), (227 * 1024,)), *itertools.product((65, 128, 2056), (UNSTAGED,))],
)
def test_edges(cuda, columns, divergence, shared_limit):
    """Rows that stand beside each other do not touch each other."""
    check_edges(cuda, columns, divergence, shared_limit=shared_limit)


def check_edges(cuda, columns, divergence, **changes):
    a, b = hard_logits(32, columns, seed=4)
    inf, nan = float("inf"), float("nan")
    last = columns - 1
    a[0, 0, last] = b[0, 0, last] = -inf  # a dead class; the whole row where it is the only one
    a[0, 1, last] = -inf
    b[0, 2, last] = -inf
    a[0, 3, 0], b[0, 4, last], a[0, 5, last], b[0, 6, 0] = nan, nan, inf, inf
    a[0, 7], b[0, 7] = -inf, -inf
    a[0, 8] = b[0, 8] = nan  # masked
    a[0, 9] = b[0, 9]
    a[0, 10, last] = -inf  # masked
    a[0, 11, :-1] = b[0, 11, :-1] = -inf  # one class is left
    weight = torch.full((1, 32), 0.25)
    weight[0, 8] = weight[0, 10] = 0
    options = {"divergence": divergence, "inv_temperature": 1.0}
    expected, _ = reference_kl.loss(a.double(), b.double(), weight.double(), **options)
    exact, exact_b = reference_kl.gradient(a.double(), b.double(), weight.double(), gradient="full", **options)
    loss, statistics = on_every_device(cuda, lambda: cuda.loss(a, b, weight, **options), **changes)
    torch.testing.assert_close(loss.double(), expected, rtol=4e-6 if columns <= 64 else 1e-6, atol=0, equal_nan=True)
    assert (statistics[:, weight == 0] == 0).all()
    options["gradient"] = "full"
    grad_a, grad_b = on_every_device(cuda, lambda: cuda.gradient(a, b, statistics, weight, **options), **changes)
    both_loss, both_a, both_b = on_every_device(
        cuda, lambda: cuda.loss_and_gradient(a, b, weight, wants_b=True, **options), **changes
    )
    assert torch.equal(bits(both_loss), bits(loss))
    for side, wanted in ((grad_a, exact), (grad_b, exact_b), (both_a, exact), (both_b, exact_b)):
        assert torch.equal(side.isnan(), wanted.isnan())
        rows = ~wanted.isnan().any(-1)
        error, size = (side - wanted)[rows].norm(dim=-1), wanted[rows].norm(dim=-1)
        assert (error <= 1e-4 * size).all()
        assert error.norm() <= 1e-5 * size.norm()
    assert (grad_a[weight == 0] == 0).all()
    assert (both_a[weight == 0] == 0).all()
    assert (both_b[weight == 0] == 0).all()


@pytest.mark.parametrize("columns", [3, 127, 2056])
def test_one_side_alone_and_scaled(cuda, columns):
    a, b = (x.to(torch.float16) for x in hard_logits(20, columns, seed=5))
    options = {"divergence": "symmetric_kl", "gradient": "full"}
    weight = torch.rand(20, generator=generator(6)).expand(3, 20)[:1].roll(1, -1)
    cuda.on(Device())
    _, statistics = cuda.loss(a, b, divergence="symmetric_kl")
    grad_a, grad_b = cuda.gradient(a, b, statistics, weight, **options)
    alone_a, none = cuda.gradient(a, b, statistics, weight, wants_b=False, **options)
    assert none is None
    assert torch.equal(bits(alone_a), bits(grad_a))
    none, alone_b = cuda.gradient(a, b, statistics, weight, wants_a=False, **options)
    assert none is None
    assert torch.equal(bits(alone_b), bits(grad_b))
    for scale in (1.0, 0.0):
        _, scaled, none = cuda.loss_and_gradient(a, b, weight, grad_scale=2.0**10 * scale, **options)
        assert none is None
        _, raised, _ = cuda.loss_and_gradient(a, b, weight * 2.0**10, grad_scale=scale, wants_b=True, **options)
        assert torch.equal(bits(scaled), bits(raised))
        assert (scaled == 0).all() == (scale == 0)


# ---- rows over the blocks of a cluster ----


def shared_for(columns: int, element_bytes: int, blocks: int) -> int:
    """A shared memory of which two slices fill a multiprocessor only where ``blocks`` share a row."""
    words = -(-(columns + 2 * (16 // element_bytes) - 2) // (16 // element_bytes))
    return 2 * (UNSTAGED + 2 * 16 * -(-words // blocks)) + 1024


@pytest.mark.parametrize("blocks", [2, 4, 8])
@pytest.mark.parametrize("divergence", ["symmetric_kl", "kl"])
@pytest.mark.parametrize(
    ("columns", "dtype"), [(1000, torch.float32), (2056, torch.bfloat16), (3001, torch.float32), (3003, torch.float16)]
)
def test_divergence_over_a_cluster(cuda, columns, dtype, divergence, blocks):
    a, b = hard_logits(12, columns, dtype, seed=7)
    changes = {"capability": 90, "shared_limit": shared_for(columns, dtype.itemsize, blocks)}
    check_divergence(cuda, surrounded(a), surrounded(b), divergence=divergence, **changes)
    assert cuda.last_cluster() == blocks


@pytest.mark.parametrize("columns", [30522, 128256])
def test_vocabularies_over_a_cluster(cuda, columns):
    changes = {"capability": 90, "multiprocessors": 1}
    check_divergence(cuda, *hard_logits(4, columns), divergence="symmetric_kl", **changes)
    assert cuda.last_cluster() == (4 if columns == 30522 else 8)


def test_few_rows_take_more_blocks(cuda):
    a, b = hard_logits(3, 8200, torch.bfloat16, seed=8)
    for multiprocessors, blocks in ((3, 1), (6, 2), (100, 4)):
        changes = {"capability": 90, "multiprocessors": multiprocessors}
        check_divergence(cuda, a, b, divergence="symmetric_kl", **changes)
        assert cuda.last_cluster() == blocks
    check_divergence(cuda, a, b, divergence="symmetric_kl", capability=89, multiprocessors=100)
    assert cuda.last_cluster() == 1
    # where not even a cluster can stage them
    check_divergence(cuda, a, b, divergence="symmetric_kl", capability=90, multiprocessors=100, shared_limit=UNSTAGED)
    assert cuda.last_cluster() == 4


@pytest.mark.parametrize("blocks", [2, 8])
@pytest.mark.parametrize("divergence", ["symmetric_kl", "kl"])
@pytest.mark.parametrize("columns", [65, 129, 2056])
def test_edges_over_a_cluster(cuda, columns, divergence, blocks):
    """Rows that all blocks leave out, or leave early, stand between others; slices may be empty."""
    check_edges(cuda, columns, divergence, capability=90, shared_limit=shared_for(columns, 4, blocks))


# ---- rows of the linear divergence ----


def linear_case(rows, columns, differences, *, seed=0, biased=True):
    """The kernel's inputs, and the float64 logits that they stand for."""
    a, b = hard_logits(rows, columns, seed=seed)
    bias = torch.randn(columns, generator=generator(seed + 1)) if biased else None
    first = (a - b) if differences else a
    added = 0 if bias is None else bias.double()
    exact_b = b.double() + added
    exact_a = exact_b + first.double() if differences else a.double() + added
    return first, b, bias, exact_a, exact_b


def check_linear(
    cuda,
    rows,
    columns,
    *,
    differences,
    divergence="symmetric_kl",
    gradient="full",
    seed=0,
    biased=True,
    inv_temperature=1.0,
    grad_dtype=torch.float32,
    offset=0,
    in_place=False,
    **changes,
):
    """Loss, d/da and d/da + d/db against the reference in float64; the sum also against its own rounding."""
    first, b, bias, exact_a, exact_b = linear_case(rows, columns, differences, seed=seed, biased=biased)
    weight = 0.5 + torch.rand(1, rows, generator=generator(5))
    weight[0, 1] = 0
    scale = 2.0**12 if grad_dtype == torch.float16 else 0.5
    options = {"divergence": divergence, "inv_temperature": inv_temperature}
    expected, _ = reference_kl.loss(exact_a, exact_b, weight.double(), **options)
    upstream = weight.double() * scale
    wants_sum = gradient == "full"
    da, db = reference_kl.gradient(exact_a, exact_b, upstream, gradient=gradient, **options)
    inputs = surrounded(first, offset), surrounded(b, offset), None if bias is None else surrounded(bias)
    loss, grad_a, grad_sum = on_every_device(
        cuda,
        lambda: cuda.linear_rows(
            *inputs, weight, differences=differences, gradient=gradient, grad_scale=scale, grad_dtype=grad_dtype,
            wants_sum=wants_sum, in_place=in_place, **options,
        ),
        **changes,
    )  # fmt: skip
    # with logits rounded after the bias the value is what fp32 logits allow; differences are exact
    counted = expected >= SMALLEST_NORMAL
    worst = ((loss - expected).abs() / expected)[counted].max().item()
    assert worst <= (4e-6 if columns <= 64 else 2e-6), worst
    assert (loss[weight == 0] == 0).all()
    for side, wanted in ((grad_a, da), *(((grad_sum, da + db),) if wants_sum else ())):
        whole, median = relative_errors(side, wanted)
        # the sum over two classes may pass through zero, with nothing beside it that is larger
        limit = 2e-5 if columns == 2 else 1e-5
        assert whole <= limit + rounding(grad_dtype), whole
        if grad_dtype != torch.float16:
            assert median <= 1e-5 + rounding(grad_dtype), median
    assert (grad_a[weight == 0] == 0).all()
    return loss, grad_a, grad_sum


@pytest.mark.parametrize("differences", [False, True])
@pytest.mark.parametrize("divergence", ["symmetric_kl", "kl"])
@pytest.mark.parametrize("columns", [2, 3, 64, 65, 130, 2056])
def test_linear(cuda, columns, divergence, differences):
    check_linear(cuda, 24, columns, differences=differences, divergence=divergence)
    check_linear(cuda, 24, columns, differences=differences, divergence=divergence, biased=False, offset=1)


@pytest.mark.parametrize("differences", [False, True])
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("columns", [66, 1000])
def test_linear_gradients_of_every_type(cuda, columns, grad_dtype, differences):
    check_linear(cuda, 16, columns, differences=differences, grad_dtype=grad_dtype, inv_temperature=0.5)
    check_linear(cuda, 16, columns, differences=differences, grad_dtype=grad_dtype, divergence="kl", offset=2)


@pytest.mark.parametrize("differences", [False, True])
@pytest.mark.parametrize(("columns", "blocks"), [(20000, 1), (3001, 1), (3001, 2), (3001, 4), (3001, 8)])
def test_linear_in_place(cuda, columns, blocks, differences):
    """Gradients written over the logits are those written elsewhere, staged or not, over a cluster or not."""
    limits = [shared_for(columns, 4, blocks)] if blocks > 1 else [UNSTAGED, 227 * 1024]
    for limit in limits:
        options = {"differences": differences, "capability": 90 if blocks > 1 else 80, "shared_limit": limit, "seed": 3}
        apart = check_linear(cuda, 6, columns, **options)
        together = check_linear(cuda, 6, columns, in_place=True, **options)
        assert cuda.last_cluster() == blocks
        for x, y in zip(apart, together, strict=True):
            assert torch.equal(bits(x), bits(y))


@pytest.mark.parametrize("gradient", ["detach_targets", "detach_clean"])
@pytest.mark.parametrize("divergence", ["symmetric_kl", "kl"])
@pytest.mark.parametrize("differences", [False, True])
def test_linear_conventions(cuda, differences, divergence, gradient):
    check_linear(cuda, 16, 300, differences=differences, divergence=divergence, gradient=gradient, seed=4)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("differences", [False, True])
@pytest.mark.parametrize(("columns", "changes"), [
    (3, {}), (129, {}), (2056, {"shared_limit": UNSTAGED}), (2056, {"capability": 90, "shared_limit": 9000}),
])  # fmt: skip
def test_linear_edges(cuda, columns, changes, differences, in_place):
    first, b, bias, _, _ = linear_case(12, columns, differences, seed=6)
    inf, nan = float("inf"), float("nan")
    last = columns - 1
    b[0, 0, last], first[0, 0, last] = -inf, 0 if differences else -inf  # a dead class
    first[0, 1, last] = -inf  # on one side
    first[0, 2, 0], b[0, 3, last], first[0, 4, last], b[0, 5, 0] = nan, nan, inf, inf
    first[0, 6], b[0, 6] = nan, nan  # masked
    first[0, 7] = 0 if differences else b[0, 7]
    exact_b = b.double() + bias.double()
    exact_a = exact_b + first.double() if differences else first.double() + bias.double()
    weight = torch.full((1, 12), 0.25)
    weight[0, 6] = 0
    options = {"divergence": "symmetric_kl", "inv_temperature": 1.0}
    expected, _ = reference_kl.loss(exact_a, exact_b, weight.double(), **options)
    da, db = reference_kl.gradient(exact_a, exact_b, weight.double(), gradient="full", **options)
    inputs = surrounded(first), surrounded(b), surrounded(bias), weight
    loss, grad_a, grad_sum = on_every_device(
        cuda, lambda: cuda.linear_rows(*inputs, differences=differences, in_place=in_place, **options), **changes
    )
    torch.testing.assert_close(loss.double(), expected, rtol=4e-6, atol=0, equal_nan=True)
    for side, wanted in ((grad_a, da), (grad_sum, da + db)):
        assert torch.equal(side.isnan(), wanted.isnan())
        rows = ~wanted.isnan().any(-1)
        error, size = (side - wanted)[rows].norm(dim=-1), wanted[rows].norm(dim=-1)
        assert (error <= 1e-4 * size).all(), (error / size).max()
    assert (grad_a[weight == 0] == 0).all()
    assert (grad_sum[weight == 0] == 0).all()


def test_linear_without_gradients_or_sum(cuda):
    first, b, bias, _, _ = linear_case(6, 500, True, seed=9)
    cuda.on(Device())
    options = {"differences": True, "divergence": "symmetric_kl"}
    loss, grad_a, _ = cuda.linear_rows(first, b, bias, **options)
    alone, none, _ = cuda.linear_rows(first, b, bias, grad_dtype=None, **options)
    assert none is None
    assert torch.equal(bits(alone), bits(loss))
    alone, alone_a, none = cuda.linear_rows(first, b, bias, wants_sum=False, **options)
    assert none is None
    assert torch.equal(bits(alone_a), bits(grad_a))
