"""Each integration of a loop of one's own in fp32, bf16 and fp16: in one process, and over two."""

import precision_cases
import pytest
import tiny_models
import torch
from precision_cases import CASES, DROP_INS, PRECISIONS, alone, drop_in, exact_drop_in
from processes import run_ranks
from tiny_loops import APART, FROM_FP32, assert_alike

RANKS = 2
SCALE = precision_cases.SCALE


def is_rounded(own: torch.Tensor, exact: torch.Tensor) -> bool:
    """As passes in fp16 or bf16 leave it."""
    return bool((own - exact).norm() > 1e-5 * exact.norm())


def far_apart(own: torch.Tensor, other: torch.Tensor) -> bool:
    """As gradients are of which one lacks the other half of the batch."""
    return bool(torch.cosine_similarity(own, other, 0) < 0.9)


def test_two_processes_have_the_gradient_of_one_in_every_precision(tmp_path):
    """Under autocast in DistributedDataParallel, by a policy in fully_shard, both with a scaler in fp16."""
    run_ranks(RANKS, precision_cases.__file__, str(tmp_path))
    found = torch.load(tmp_path / f"gradients-{RANKS}.pt")
    exact = {name: alone(name, "fp32") for name in CASES}
    for precision, dtype in PRECISIONS.items():
        for name in CASES:
            own = found["parallel"][name, precision]
            assert_alike([own], [alone(name, precision)], APART[dtype], f"{name}, {precision}")
            assert is_rounded(own, exact[name]) == (dtype is not None), (name, precision)
            # a policy casts parameters where autocast casts operands
            own, limits = found["sharded"][name, precision], APART[None] if dtype is None else FROM_FP32[dtype]
            assert_alike([own], [exact[name]], limits, f"sharded {name}, {precision}")
            assert is_rounded(own, exact[name]) == (dtype is not None), (name, precision)
        compare_drop_ins(found, precision)
    compare_exact_drop_ins(found["exact drop-in"])
    compare_overflows(found["overflow"])


def compare_drop_ins(found: dict, precision: str) -> None:
    """With noise of each rank's own, as it is drawn there, in one process as well."""
    dtype, ranks = PRECISIONS[precision], list(range(RANKS))
    for name in DROP_INS:
        own = found["drop-in"][name, precision]
        assert_alike([own], [drop_in(name, precision, tiny_models.bert(), ranks, RANKS)], APART[dtype], name)
        assert far_apart(own, drop_in(name, precision, tiny_models.bert(), [0], RANKS))
        exact = drop_in(name, "fp32", tiny_models.bert(), ranks, RANKS)
        assert is_rounded(own, exact) == (dtype is not None), (name, precision)
    limits = APART[None] if dtype is None else FROM_FP32[dtype]
    assert set(found["sharded drop-in"]) == {(name, kind) for name in DROP_INS for kind in PRECISIONS}
    for (name, kind), own in found["sharded drop-in"].items():
        if kind == precision:
            exact = drop_in(name, "fp32", tiny_models.bert(), ranks, RANKS)
            assert_alike([own], [exact], limits, f"sharded {name}, {precision}")
            assert is_rounded(own, exact) == (dtype is not None), (name, precision)


def compare_exact_drop_ins(found: dict) -> None:
    """In fp64, to its rounding, in DistributedDataParallel and with parameters kept or freed by fully_shard."""
    assert len(found) == 3 * len(DROP_INS)
    for (name, way), own in found.items():
        expected = exact_drop_in(name, tiny_models.bert().double(), list(range(RANKS)), RANKS)
        torch.testing.assert_close(own, expected, rtol=1e-8, atol=1e-11, msg=lambda m, n=(name, way): f"{n}: {m}")


def compare_overflows(found: dict) -> None:
    """No rank makes the step of which one has no finite gradient, and all have the next one and the same scale."""
    assert len(found) == 4
    for (kind, name), stages in found.items():
        skipped = 0
        for stage, after in stages.items():
            skipped += stage != "finite"
            assert after["equal"], (kind, name, stage)
            assert after["scales"] == [SCALE / 2**skipped] * RANKS, (kind, name, stage)
            assert all((moved > 1e-3) == (stage == "finite") for moved in after["moved"]), (kind, name, stage)
        assert skipped == (2 if kind == "sharded" else 1)


@pytest.mark.parametrize("name", DROP_INS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_drop_ins_train_under_autocast_as_in_fp32(name, precision):
    found, exact = (drop_in(name, kind, tiny_models.bert(), [0], 1) for kind in (precision, "fp32"))
    assert not torch.equal(found, exact)
    assert_alike([found], [exact], FROM_FP32[PRECISIONS[precision]])
