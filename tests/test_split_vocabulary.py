"""Rows whose classes are cut into slices: their parts meet to what the whole row gives, wherever it is cut."""

import math

import pytest
import torch
import vocabulary_ranks
from hypothesis import given as given_
from hypothesis import strategies as st
from linear_operands import error, in_float64, operands
from oracle import gradient_errors, logit_pair, relative_error
from processes import group_of_one, run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from alum_kernels import linear_symmetric_kl
from alum_kernels.backends.linear_chunks import LinearDivergence, LinearOptions, Wanted
from alum_kernels.backends.reference import symmetric_kl as reference
from alum_kernels.backends.split_vocabulary import Slice, SplitRows, gradients_of, merged, slice_of
from alum_kernels.ops.linear_arguments import LINEAR_DIVERGENCES
from alum_kernels.ops.symmetric_kl import GRADIENTS
from benchmarks.timing import peak_memory


def in_slices(
    difference: Tensor,
    b: Tensor,
    sizes: list[int],
    grad_rows: Tensor | None = None,
    *,
    divergence: str = "symmetric_kl",
    gradient: str = "full",
    inv_temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, reference.RowStatistics]:
    """Loss, d/da, d/da + d/db and statistics of rows whose classes are cut into slices of these sizes."""
    grad_rows = torch.ones(len(b), dtype=b.dtype) if grad_rows is None else grad_rows
    parts = [
        slice_of(clean + step, clean, step, inv_temperature)
        for step, clean in zip(difference.split(sizes, 1), b.split(sizes, 1), strict=True)
    ]
    row = merged(Slice(*map(torch.stack, zip(*(told for told, _ in parts), strict=True))), divergence, inv_temperature)
    options = {"divergence": divergence, "gradient": gradient, "inv_temperature": inv_temperature}
    sides = [
        gradients_of(terms, row, rank, grad_rows, **options)
        for rank, (_, terms) in enumerate(parts)
        if terms is not None
    ]
    side_a, both = (torch.cat(side, 1) for side in zip(*sides, strict=True))
    return row.loss, side_a, both, row.statistics


def whole(
    difference: Tensor, b: Tensor, grad_rows: Tensor | None = None, *, gradient: str = "full", **options
) -> tuple[Tensor, Tensor, Tensor, reference.RowStatistics]:
    """The same of rows in one piece, in float64."""
    difference, b = difference.double(), b.double()
    grad_rows = torch.ones(len(b), dtype=b.dtype) if grad_rows is None else grad_rows.double()
    options = {"divergence": "symmetric_kl", "inv_temperature": 1.0} | options
    loss, statistics = reference.loss(b + difference, b, None, difference=difference, **options)
    return loss, *reference.linear_gradient(difference, b, grad_rows, gradient=gradient, **options), statistics


def assert_alike(found, expected, tolerance: float, inv_temperature: float = 1.0, rounding: float = 0.0) -> None:
    """Within a tolerance relative to each norm; of gradients, beside the ``rounding`` of d, which may be larger."""
    for name, got, want in zip(("loss", "side_a", "both"), found, expected, strict=False):
        room = tolerance * want.norm() + (0.0 if name == "loss" else rounding)
        assert ((got - want).norm() <= room + 1e-300).item(), name
    for name in ("log_ratio", "mean_p", "mean_q"):  # counted from c, which is the difference at one class or another
        got, want = ((getattr(of[3], name) + of[3].c * inv_temperature) for of in (found, expected))
        torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-12, equal_nan=True, msg=name)
    torch.testing.assert_close(found[3].lse_b, expected[3].lse_b, rtol=tolerance, atol=0, equal_nan=True)


@st.composite
def cuts(draw: st.DrawFn) -> list[int]:
    """Sizes of up to five slices, of no and of one class too, at least one class together."""
    return draw(st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(sum))


@given_(
    sizes=cuts(),
    perturbation=st.sampled_from([1e-6, 1e-3, 1.0, 10.0, 50.0]),
    raised=st.sampled_from([0.0, 24.0]),
    divergence=st.sampled_from(LINEAR_DIVERGENCES),
    gradient=st.sampled_from(GRADIENTS),
    inv_temperature=st.sampled_from([1.0, 0.6]),
    dropped=st.sampled_from([0.0, 0.3, 0.9]),
    seed=st.integers(0, 10**6),
)
def test_where_a_row_is_cut_changes_nothing(
    sizes, perturbation, raised, divergence, gradient, inv_temperature, dropped, seed
):
    """In float64; classes switched off leave some slices without weight, and the largest logit lies in any."""
    a, b = logit_pair(6, sum(sizes), perturbation, raised=raised, seed=seed)
    difference, b = (a - b).double(), b.double()
    generator = torch.Generator().manual_seed(seed)
    off = torch.rand(sum(sizes), generator=generator) < dropped
    off[torch.randint(sum(sizes), (1,), generator=generator)] = False
    b[:, off] = -math.inf
    grad_rows = torch.tensor([1.0, 0.0, -3.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    options = {"divergence": divergence, "gradient": gradient, "inv_temperature": inv_temperature}
    found = in_slices(difference, b, sizes, grad_rows, **options)
    # two softmaxes that are equal but for 1e-6 leave float64 eleven digits of a second-order quantity; where both are
    # one-hot, p (d - E_p[d]) is what is left of two equal numbers as large as the range of d: eps of it, cut and uncut
    spread = difference[:, ~off].amax(1) - difference[:, ~off].amin(1)
    rounding = 2 * torch.finfo(torch.float64).eps * float((spread * grad_rows).norm())
    assert_alike(found, whole(difference, b, grad_rows, **options), 1e-9, inv_temperature, rounding)
    assert (found[1][1] == 0).all()
    assert (found[1][:, off] == 0).all()


@pytest.mark.parametrize(
    ("scale", "raised", "perturbation"),
    [
        (3.0, 0.0, 1e-5),
        (3.0, 24.0, 1e-5),
        (8.0, 24.0, 1e-6),
        (3.0, 24.0, 10.0),
        *(
            pytest.param(scale, raised, perturbation, marks=pytest.mark.slow)
            for scale in (3.0, 8.0)
            for raised in (0.0, 24.0)
            for perturbation in (1e-6, 1e-5, 1e-3, 0.1, 1.0, 10.0)
        ),
    ],
)
@pytest.mark.parametrize("slices", [2, 4])
def test_accuracy_at_a_vocabulary(slices, scale, raised, perturbation):
    """fp32 over 30,522 classes: value 1e-6, gradients 1e-5, a confident class in the first slice and in the last."""
    columns, rows = 30522, 8
    sizes = [columns // slices] * (slices - 1) + [columns - columns // slices * (slices - 1)]
    difference, b = logit_pair(rows, columns, 3.0, scale=scale)
    difference = perturbation * torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    b[: rows // 2, 11] += raised
    b[rows // 2 :, -11] += raised
    loss, *sides, _ = in_slices(difference, b, sizes)
    expected, *wanted, _ = whole(difference, b)
    assert relative_error(loss, expected) <= 1e-6
    for side, want in zip(sides, wanted, strict=True):
        assert max(gradient_errors(side, want)) <= 1e-5


@pytest.mark.parametrize("sizes", [[35, 35], [69, 1]])
def test_one_side_underflows_against_the_other(sizes):
    """At a perturbation of 50: value 4e-6, gradient 1e-4."""
    b = 3 * torch.randn(500, 70, generator=torch.Generator().manual_seed(0))
    difference = 50 * torch.randn(500, 70, generator=torch.Generator().manual_seed(1))
    loss, side_a, *_ = in_slices(difference, b, sizes)
    expected, want, *_ = whole(difference, b)
    assert relative_error(loss, expected) <= 4e-6
    assert max(gradient_errors(side_a, want)) <= 1e-4


@pytest.mark.parametrize("at", [0, 3, 5])
def test_rows_without_a_finite_divergence(at):
    """-inf on one side alone, NaN, +inf, nothing but -inf: in any slice, and no other row is touched."""
    b = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    difference = 0.1 * torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    clean = in_slices(difference, b, [3, 2, 1])
    difference[0, at] = -math.inf
    b[1, at] = math.nan
    b[2, at] = math.inf
    b[3] = -math.inf
    loss, side_a, both, statistics = in_slices(difference, b, [3, 2, 1])
    assert loss[0] == math.inf
    assert loss[1:4].isnan().all()
    assert side_a[:4].isnan().all()
    assert both[:4].isnan().all()
    assert statistics.lse_b[:4].isnan().all()
    for found, want in zip((loss, side_a, both), clean[:3], strict=True):
        assert torch.equal(found[4:], want[4:])


def test_one_class_has_no_divergence():
    difference, b = torch.ones(3, 1), torch.zeros(3, 1)
    for sizes in ([1], [0, 1], [1, 0, 0]):
        loss, side_a, both, _ = in_slices(difference, b, sizes)
        assert (loss == 0).all()
        assert (side_a == 0).all()
        assert (both == 0).all()


class OneRank:
    """A split with all classes on the only rank: what the ranks send each other is what they have."""

    rank = 0

    def __init__(self, columns: int) -> None:
        self.sizes = (columns,)

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(0)

    def summed(self, tensor: Tensor):
        return lambda: tensor


@pytest.mark.parametrize(("dtype", "soft_cap"), [(torch.float32, None), (torch.float64, 4.0)])
def test_the_memory_of_a_chunk(dtype, soft_cap):
    columns, budget = 4000, 10 << 20
    given = operands(120, 4, columns, dtype=dtype)
    split, options = OneRank(columns), LinearOptions("symmetric_kl", "full", 1.0, 1.0, soft_cap, "none", budget)
    call = LinearDivergence(
        SplitRows(split.gather, 0), *given.values(), None, None, options, Wanted(True, True, True, True), split=split
    )
    peak = peak_memory(call.run, torch.device("cpu"))
    assert 0.7 * budget <= peak <= 1.02 * budget
    expected = in_float64(given, "symmetric_kl", reduction="sum", soft_cap=soft_cap)
    assert error(call.result.rows.sum(), expected[0]) <= 2e-6
    assert error(call.result.weight, expected[1]["weight"]) <= 5e-6


def test_half_precision_on_a_gpu_takes_both_logits():
    """The plan of the products that CUDA has for it, as the CPU emulates it."""
    given = operands(32, 64, 700, 0.03, spread=0.1, dtype=torch.bfloat16)
    expected = in_float64(given, "symmetric_kl", reduction="sum")
    split, wanted = OneRank(700), Wanted(True, True, True, True)
    arguments = (*given.values(), None, None, LinearOptions("symmetric_kl", "full"), wanted)
    result = LinearDivergence(SplitRows(split.gather, 0), *arguments, plan="sides", split=split).run()
    assert error(result.rows.sum(), expected[0]) <= 1e-5
    assert error(result.hidden, expected[1]["hidden"]) <= 1e-3
    assert error(result.weight, expected[1]["weight"]) <= 3e-3


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"group": "world"}, TypeError, "^group: expected a torch.distributed.ProcessGroup .*, got str"),
        ({"group": -100}, TypeError, "^group: expected a torch.distributed.ProcessGroup .*, got int"),
        ({"weight": [Shard(1)]}, ValueError, r"^weight: expected a DTensor with placement .*got \(Shard\(dim=1\),\)"),
        ({"weight": [Partial()]}, ValueError, r"^weight: .*got \(Partial\(sum\),\); weight.redistribute"),
        (
            {"weight": [Shard(0), Shard(0)]},
            ValueError,
            r"^weight: .*on one dimension of its mesh, got \(Shard\(dim=0\), S",
        ),
        ({"weight": [Shard(0)], "bias": None}, TypeError, "^bias: expected a DTensor as weight is, got a plain tensor"),
        ({"bias": [Replicate()]}, TypeError, "^bias: expected a plain tensor as weight is, got a DTensor"),
        ({"weight": [Shard(0)], "bias": [Replicate()]}, ValueError, "^bias: expected mesh and placements .*of weight"),
        ({"hidden": [Replicate()]}, TypeError, "^hidden: expected a plain tensor as weight is, got a DTensor"),
        (
            {"weight": [Shard(0)], "hidden": [Shard(0)]},
            ValueError,
            r"^hidden: expected placement Replicate\(\) on every",
        ),
        ({"mask": [Replicate()]}, TypeError, "^mask: expected a plain tensor, got a DTensor"),
        ({"weight": [Shard(0)], "group": True}, ValueError, "^group: expected None with a DTensor weight"),
    ],
)
def test_what_is_not_split_so_is_refused(one_process, changes, kind, message):
    arguments = operands() | {"mask": torch.ones(7, dtype=torch.bool)}
    for name, change in changes.items():
        if name == "group":
            arguments[name] = torch.distributed.group.WORLD if change is True else change
        elif change is not None:
            mesh = init_device_mesh("cpu", (1,) * len(change))
            placed = [Replicate() if isinstance(placement, Partial) else placement for placement in change]
            arguments[name] = distribute_tensor(arguments[name], mesh, placed)
            if placed != change:
                arguments[name] = type(arguments[name]).from_local(arguments[name].to_local(), mesh, change)
    if "bias" not in changes and isinstance(changes.get("weight"), list):
        arguments["bias"] = None
    with pytest.raises(kind, match=message):
        linear_symmetric_kl(**arguments)


def test_a_group_of_one_rank_is_a_whole_head(one_process):
    given = operands()
    expected = linear_symmetric_kl(*given.values())
    assert torch.equal(linear_symmetric_kl(*given.values(), group=torch.distributed.group.WORLD), expected)
    mesh = init_device_mesh("cpu", (1, 1))
    head = {n: distribute_tensor(given[n], mesh, [Replicate(), Shard(0)]).requires_grad_() for n in ("weight", "bias")}
    loss = linear_symmetric_kl(**{**given, **head})
    assert torch.equal(loss.detach(), expected)
    loss.backward()
    assert head["weight"].grad.placements == (Replicate(), Shard(0))


@pytest.fixture
def one_process(tmp_path):
    with group_of_one(tmp_path):
        yield


def test_two_processes_give_the_gradient_of_one(tmp_path):
    run_ranks(
        2,
        vocabulary_ranks.__file__,
        "conventions,ascent,cross_entropy,distributed_tensors,disagreements,compiled",
        str(tmp_path),
    )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_reach_the_accuracy_of_one_and_train_language_models(tmp_path, ranks):
    checks = "accuracy,language_models,language_models_in_half"
    run_ranks(ranks, vocabulary_ranks.__file__, checks, str(tmp_path))


@pytest.mark.slow
def test_four_processes_give_the_gradient_of_one(tmp_path):
    checks = "conventions,ascent,cross_entropy,distributed_tensors,mesh_of_two_dimensions,disagreements"
    run_ranks(4, vocabulary_ranks.__file__, checks, str(tmp_path))
