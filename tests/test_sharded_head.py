"""Language models whose head ``fully_shard`` splits over processes, without logits: the gradients of one process."""

import pytest
import sharded_head_cases
import torch
from processes import run_ranks
from rank_cases import gradients
from sharded_head_cases import ACCUMULATED, CASES, EVERY_LAYOUT, FEW, HALF, accumulated_alone
from test_fully_sharded import compare_half


def test_sharded_heads_have_the_gradient_of_one_process(tmp_path):
    """Whatever unit has the weight, tied or not, kept or freed after a forward; every case demands the fused head."""
    run_ranks(2, sharded_head_cases.__file__, str(tmp_path), FEW_CASES="1")
    found = torch.load(tmp_path / "gradients-2.pt")
    assert set(found["cases"]) == set(FEW)
    compare_cases(found["cases"])
    compare_choices(found["chosen"], 2)
    said = found["taken for a split head"]
    assert said.startswith(
        "adv_hidden: expected the same on every rank of the group, got others on ranks [1] than here"
    )
    assert said.endswith("a weight that fully_shard splits is no split head, but whole in forwards of its module")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_heads_have_it_in_every_method_and_precision(ranks, tmp_path):
    run_ranks(ranks, sharded_head_cases.__file__, str(tmp_path))
    found = torch.load(tmp_path / f"gradients-{ranks}.pt")
    assert set(found["cases"]) == set(CASES)
    compare_cases(found["cases"])
    for name, case in ACCUMULATED.items():
        assert_equal(found["accumulated"][name], accumulated_alone(case, ranks), f"accumulated {name}")
    for kind in ("as it is", "freed"):
        compare_half({name: own for (name, way), own in found["half"].items() if way == kind}, HALF)
    compare_choices(found["chosen"], ranks)
    assert_few_gathers(found["gathers"])


def compare_cases(found: dict[str, dict[str, tuple[dict[str, torch.Tensor], torch.Tensor]]]) -> None:
    for name, ways in found.items():
        expected, loss = gradients(CASES[name], CASES[name].model())
        assert len(ways) >= (6 if name in EVERY_LAYOUT else 1)
        for way, (own, own_loss) in ways.items():
            assert float(own_loss) == pytest.approx(float(loss), rel=1e-8, abs=1e-12), (name, way)
            assert_equal(own, expected, f"{name}, {way}")


def assert_equal(own: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], where: str) -> None:
    assert own.keys() == expected.keys(), where
    for parameter, grad in expected.items():
        torch.testing.assert_close(
            own[parameter], grad, rtol=1e-8, atol=1e-11, msg=lambda m, n=parameter: f"{where}, {n}: {m}"
        )


def compare_choices(found: dict[str, list], ranks: int) -> None:
    """Ranks that cannot tell go by the one that can, and all say the same."""
    assert found["linear"] == [(True, [])] * ranks
    linear, (said,) = found["scaled"][0]
    assert not linear
    assert "its logits are not its output projection's" in said
    assert found["scaled"] == [(False, [said])] * ranks


def assert_few_gathers(found: dict[str, dict[str, tuple[int, int]]]) -> None:
    """Of the unit that has the head, as docs/distributed.md counts them.

    Freed after a forward, it is gathered once more for each use of its weight. Kept, as it is by default, it is
    gathered as often as where the logits are formed.
    """
    assert found == {
        "standard": {"freed": (3, 1), "kept": (1, 1)},
        "alum": {"freed": (8, 1), "kept": (2, 1)},
        "alum, K = 2": {"freed": (12, 1), "kept": (3, 1)},
        "low memory": {"freed": (11, 2), "kept": (3, 2)},
        "alum, logits": {"freed": (5, 1), "kept": (2, 1)},
    }
