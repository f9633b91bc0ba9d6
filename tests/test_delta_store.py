"""Perturbations that serve several visits of a sample."""

import pytest
import tiny_models
import torch
from method_cases import MOVED

from alum_kernels import AdversarialObjective
from alum_kernels.adversarial.delta_store import DeltaStore


def forwards(model: torch.nn.Module) -> list[int]:
    seen: list[int] = []
    model.bert.encoder.register_forward_hook(lambda *_: seen.append(1))
    return seen


def test_a_sample_is_climbed_at_its_first_visit_and_every_so_many():
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    objective = AdversarialObjective(model, MOVED.replace(delta_lifetime=3))
    seen, counts, divergences = forwards(model), [], []
    for _ in range(7):
        before = len(seen)
        divergences.append(float(objective.backward(batch, samples=[3, 1, 4, 9])["divergence"]))
        counts.append(len(seen) - before)
    assert counts == [3, 2, 2, 3, 2, 2, 3]
    assert divergences[0] == pytest.approx(divergences[1], rel=1e-5) == pytest.approx(divergences[2], rel=1e-5)
    assert divergences[3] != divergences[2]


def test_perturbations_go_with_their_samples_and_not_with_their_places():
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    objective = AdversarialObjective(model, MOVED.replace(delta_lifetime=2))
    first = objective.backward(batch, samples=torch.arange(4))["divergence"]
    order = torch.tensor([2, 0, 3, 1])
    turned = {name: value[order] for name, value in batch.items()}
    torch.testing.assert_close(objective.backward(turned, samples=order)["divergence"], first, rtol=1e-5, atol=0)
    other = AdversarialObjective(model, MOVED.replace(delta_lifetime=2))
    other.backward(batch, samples=range(4))
    wrong = other.backward(turned, samples=range(4))["divergence"]
    assert abs(float(wrong) - float(first)) > 1e-3 * float(first)


def test_more_padding_changes_nothing():
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    objective = AdversarialObjective(model, MOVED.replace(delta_lifetime=3))
    first = objective.backward(batch, samples=range(4))["divergence"]
    longer = tiny_models.with_more_padding(batch)
    torch.testing.assert_close(objective.backward(longer, samples=range(4))["divergence"], first, rtol=1e-5, atol=0)
    torch.testing.assert_close(objective.backward(batch, samples=range(4))["divergence"], first, rtol=1e-5, atol=0)


def test_one_new_sample_makes_the_batch_climb():
    store = DeltaStore(2)
    store.put([0, 1], [torch.ones(2, 3, 4)])
    assert store.take([0, 2]) is None
    (make,) = store.take([1, 0])
    assert torch.equal(make((2, 5, 4)), torch.nn.functional.pad(torch.ones(2, 3, 4), (0, 0, 0, 2)))
    assert store.take([0]) is None


@pytest.mark.parametrize(
    ("schedule", "passes"),
    [
        # a clean pass and the teacher's in each step; the pass that is trained on, the ascent's
        ({"start": 0.25}, [2, 2, 4, 3, 4, 3]),
        ({"alpha_schedule": ((0.0, 0.0), (0.25, 0.0), (1.0, 1.0))}, [2, 2, 2, 4, 3, 4]),
        ({"adversarial_interval": 2}, [4, 2, 3, 2, 4, 2]),
    ],
)
def test_a_step_for_the_teacher_alone_is_no_visit(schedule, passes):
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    objective = AdversarialObjective(model, MOVED.replace(delta_lifetime=2, proximal=1.0, **schedule))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    objective.follow(optimizer)
    seen, counts = forwards(model), []
    for step in range(6):
        objective.set_progress(step, 8)
        before = len(seen)
        objective.backward(batch, samples=range(4))
        counts.append(len(seen) - before)
        optimizer.step()
    assert counts == passes


def test_identifiers_are_needed_and_come_from_the_host():
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    with pytest.raises(ValueError, match=r"^samples: expected an identifier of each sample with delta_lifetime 2"):
        AdversarialObjective(model, MOVED.replace(delta_lifetime=2)).backward(batch)
    with pytest.raises(ValueError, match=r"^samples: expected None with delta_lifetime 1"):
        AdversarialObjective(model, MOVED).backward(batch, samples=[0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"^samples: expected 4, one a sample, got 3"):
        AdversarialObjective(model, MOVED.replace(delta_lifetime=2)).backward(batch, samples=[0, 1, 2])
