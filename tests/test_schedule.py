"""Schedules, by themselves and as an objective follows them."""

import copy

import numpy as np
import pytest
import torch
from method_cases import LARGE, assert_same, descend, example, objective_of, preset, visible, written
from tiny_models import Gradients
from torch import Tensor

from alum_kernels import AdversarialConfig
from alum_kernels.adversarial.schedule import Progress, check_points, check_start

WARM_UP = ((0.0, 0.0), (0.25, 1.0))
JUMP = ((0.5, 0.25), (0.5, 2.0))
MANY = ((0.1, 3.0), (0.3, 1.0), (0.3, 0.5), (0.8, 0.0), (1.0, 4.0))
TOTAL = 40


@pytest.mark.parametrize("points", [WARM_UP, ((0.2, 3.0), (0.4, 1.0), (0.9, 2.0))])
def test_straight_lines_between_points_and_constants_outside(points):
    shares, values = zip(*points, strict=True)
    for done in range(TOTAL + 3):
        expected = np.interp(done / TOTAL, shares, values)
        assert Progress(done, TOTAL).value("alpha_schedule", points) == pytest.approx(expected, rel=1e-14, abs=1e-15)


def test_two_points_at_one_share_are_a_jump_and_the_later_holds_there():
    values = {share: Progress(share, 100).value("alpha_schedule", MANY) for share in (0, 10, 20, 29, 30, 55, 90, 100)}
    expected = {0: 3.0, 10: 3.0, 20: 2.0, 29: 1.1, 30: 0.5, 55: 0.25, 90: 2.0, 100: 4.0}
    assert values == pytest.approx(expected, rel=1e-12)
    assert [Progress(done, 4).value("alpha_schedule", JUMP) for done in range(5)] == [0.25, 0.25, 2.0, 2.0, 2.0]


def test_without_points_the_default_and_with_one_a_constant():
    assert Progress().value("alpha_schedule", ()) == 1.0
    assert Progress().value("proximal_momentum", (), default=0.0) == 0.0
    assert Progress().value("proximal_momentum", ((0.4, 0.9),)) == 0.9


def test_a_share_needs_the_length_of_the_training():
    with pytest.raises(ValueError, match=r"^alpha_schedule: expected a training of known length; call .*set_progress"):
        Progress(3).value("alpha_schedule", WARM_UP)
    with pytest.raises(ValueError, match=r"^start: expected a training of known length"):
        Progress(3).started(0.5)
    assert Progress(3, 0).share("start") == 1.0
    assert Progress(9, 4).share("start") == 1.0


def test_a_start_is_a_step_or_a_share():
    assert [Progress(done, 4).started(2) for done in range(4)] == [False, False, True, True]
    assert [Progress(done).started(2) for done in range(4)] == [False, False, True, True]
    assert [Progress(done, 4).started(0.5) for done in range(4)] == [False, False, True, True]
    assert [Progress(done, 5).started(0.5) for done in range(5)] == [False, False, False, True, True]
    assert [Progress(done, 4).started(1.0) for done in (3, 4)] == [False, True]
    assert Progress().started(0)
    assert Progress().started(0.0)
    assert not Progress(0, 4).started(1)


def test_what_is_no_schedule_is_named():
    assert check_points("alpha_schedule", [[0, 1], [1, 2]]) == ((0.0, 1.0), (1.0, 2.0))
    for points, error in (
        (3, TypeError),
        ("01", TypeError),
        ((0.5,), TypeError),
        (((0.0, 1.0, 2.0),), TypeError),
        (((0.0, True),), TypeError),
        (((0.0, "1"),), TypeError),
        (((-0.1, 1.0),), ValueError),
        (((1.1, 1.0),), ValueError),
        (((0.0, float("nan")),), ValueError),
        (((0.0, float("inf")),), ValueError),
        (((0.0, -1.0),), ValueError),
        (((0.5, 1.0), (0.4, 1.0)), ValueError),
    ):
        with pytest.raises(error, match=r"^epsilon_schedule: expected "):
            check_points("epsilon_schedule", points)
    for start, error in ((True, TypeError), ("1", TypeError), (-1, ValueError), (1.5, ValueError), (-0.5, ValueError)):
        with pytest.raises(error, match=r"^start: expected "):
            check_start("start", start)


def at(config: AdversarialConfig, done: int) -> tuple:
    """Output and gradients of a step after ``done`` of ``TOTAL``."""
    original, batch = example("bag", "classification")
    model = copy.deepcopy(original)
    objective = objective_of("bag", model, config)
    objective.set_progress(done, TOTAL)
    options = {"update": descend(model, 0.1)} if config.backward == "replay" else {}
    output = objective.forward(batch, seed=torch.tensor([977]), sample_offset=3, backward=Tensor.backward, **options)
    output.loss.backward()
    return output, Gradients.of(model).values


def by_hand(config: AdversarialConfig):
    original, batch = example("bag", "classification")
    return written("bag", copy.deepcopy(original), batch, "classification", config)


@pytest.mark.parametrize("done", [0, 4, 10, 25, 40])
@pytest.mark.parametrize("points", [WARM_UP, JUMP, MANY])
def test_the_weight_of_the_divergence_follows_its_schedule(points, done):
    config = visible("smart")
    factor = Progress(done, TOTAL).value("", points)
    assert_same(*at(config.replace(alpha_schedule=points), done), by_hand(config.replace(alpha=config.alpha * factor)))


@pytest.mark.parametrize("done", [0, 4, 10, 25, 40])
@pytest.mark.parametrize("method", ["smart", "freelb", "pgd", "vat", "freeat", "neftune"])
def test_the_sizes_follow_their_schedule_together(method, done):
    config = visible(method)
    factor = Progress(done, TOTAL).value("", MANY)
    scaled = {name: factor * getattr(config, name) for name in LARGE}
    assert_same(*at(config.replace(epsilon_schedule=MANY), done), by_hand(config.replace(**scaled)), rtol=1e-8)


@pytest.mark.parametrize("done", range(5))
def test_between_the_steps_of_an_interval_there_is_the_task_alone(done):
    config = visible("smart").replace(adversarial_interval=3)
    weights = {"alpha": 3 * config.alpha} if done % 3 == 0 else {"alpha": 0.0}
    assert_same(*at(config, done), by_hand(config.replace(adversarial_interval=1, **weights)))


def test_one_objective_goes_through_its_schedule():
    config = visible("smart").replace(epsilon_schedule=((0.0, 1.0), (1.0, 0.0)), alpha_schedule=WARM_UP)
    original, batch = example("bag", "classification")
    objective = objective_of("bag", copy.deepcopy(original), config)
    for done in (0, 5, 20, 5, 40):
        objective.set_progress(done, TOTAL)
        again = objective.forward(batch, seed=torch.tensor([977]), sample_offset=3)
        once, _ = at(config, done)
        assert torch.equal(again.loss, once.loss)
        assert torch.equal(again.divergence, once.divergence)
        assert (again.divergence > 0) == (done not in (0, 40))


def test_a_start_and_a_schedule_are_both_of_the_whole_training():
    config = visible("smart").replace(start=0.5, alpha_schedule=((0.0, 0.0), (1.0, 1.0)))
    assert at(config, 19)[0].divergence == 0
    assert_same(*at(config, 20), by_hand(visible("smart").replace(alpha=0.5)))


def test_each_forward_is_a_step_until_progress_is_told():
    original, batch = example("bag", "classification")
    objective = objective_of("bag", copy.deepcopy(original), visible("smart").replace(start=2))
    assert [bool(objective(**batch).divergence > 0) for _ in range(4)] == [False, False, True, True]
    objective.set_progress(1)
    assert [bool(objective(**batch).divergence > 0) for _ in range(3)] == [False, False, False]
    objective.set_progress(2)
    assert objective(**batch).divergence > 0


def test_an_objective_that_does_not_know_the_length_says_so():
    original, batch = example("bag", "classification")
    for name, value in (("alpha_schedule", WARM_UP), ("epsilon_schedule", WARM_UP), ("start", 0.5)):
        objective = objective_of("bag", copy.deepcopy(original), visible("smart").replace(**{name: value}))
        with pytest.raises(ValueError, match=f"^{name}: expected a training of known length"):
            objective(**batch)
        objective.set_progress(0)
        with pytest.raises(ValueError, match=f"^{name}: expected a training of known length"):
            objective(**batch)
        objective.set_progress(3, 4)
        assert objective(**batch).divergence > 0


def test_a_curriculum_of_pretraining_is_the_standard_objective_first():
    config = preset("alum_pretraining", start=0.5, **LARGE)
    same = preset("alum_pretraining", alpha_schedule=((0.5, 0.0), (0.5, 1.0)), **LARGE)
    plain = by_hand(config.replace(start=0, alpha=0.0))
    for done, expected in ((19, plain), (20, by_hand(config.replace(start=0)))):
        for curriculum in (config, same):
            assert_same(*at(curriculum, done), expected)
