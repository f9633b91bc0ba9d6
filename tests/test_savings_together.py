"""Steps that cost less, combined with each other, with precisions, and with what others do to a model."""

import copy

import pytest
import tiny_models
import torch
from method_cases import MOVED

from alum_kernels import AdversarialObjective


def test_masks_that_differ_between_two_clean_passes_are_refused():
    with pytest.raises(ValueError, match=r"^memory: expected 'high' with dropout='independent'"):
        MOVED.replace(memory="low", dropout="independent")


@pytest.mark.parametrize("dropout", ["shared", "off"])
@pytest.mark.parametrize("memory", ["high", "low"])
def test_room_for_the_labels_of_a_batch_is_room_for_those_of_a_part(dropout, memory):
    """All labels are one sample's, and the part may have it."""
    batch = tiny_models.masked_lm_batch(8, 20)
    batch["labels"] = torch.where(torch.arange(8).unsqueeze(1) == 0, batch["input_ids"], -100)
    batch["labels"][batch["attention_mask"] == 0] = -100
    config = MOVED.replace(adversarial_fraction=0.25, dropout=dropout, memory=memory)
    for seed in range(6):
        found = []
        for capacity in (None, 0.2):
            torch.manual_seed(0)
            model = tiny_models.bert_masked_lm(0.1).double()
            objective = AdversarialObjective(model, config.replace(labelled_capacity=capacity))
            output = objective.forward(batch, seed=torch.tensor([seed]), backward=torch.Tensor.backward)
            output.loss.backward()
            found.append((output.loss, output.divergence, tiny_models.Gradients.of(model).flat()))
        for exact, with_room in zip(*found, strict=True):
            torch.testing.assert_close(with_room, exact, rtol=1e-7, atol=1e-12)


def test_a_number_of_items_that_a_model_may_ignore_is_refused():
    objective = AdversarialObjective(tiny_models.bert(), MOVED.replace(adversarial_fraction=0.5))
    with pytest.raises(ValueError, match=r"^batch: expected no 'num_items_in_batch' with adversarial_fraction < 1"):
        objective.backward({**tiny_models.classification_batch(), "num_items_in_batch": torch.tensor(4)})


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("training", "ascent"),
    [
        (torch.bfloat16, "float16"),
        (torch.float16, "bfloat16"),
        (torch.bfloat16, "float32"),
        (torch.float16, "float32"),
        (None, "float16"),
    ],
)
def test_an_ascent_in_another_precision_than_the_autocast_around_it(training, ascent, fused):
    model, batch = tiny_models.bert_masked_lm(), tiny_models.masked_lm_batch()
    config = MOVED.replace(ascent_dtype=ascent, fused_head=fused, steps=2, signal_check_interval=1)
    objective = AdversarialObjective(model, config)
    with torch.autocast("cpu", training or torch.bfloat16, enabled=training is not None):
        loss = objective(**batch).loss
    loss.backward()
    assert objective.telemetry.read()["ascent_cosine"] > 0.9
    assert tiny_models.Gradients.of(model).flat().isfinite().all()


def test_a_model_in_half_precision_has_no_fp32_to_climb_in():
    with pytest.raises(ValueError, match=r"^ascent_dtype: expected a model with fp32 parameters for 'float32'"):
        AdversarialObjective(tiny_models.bert().bfloat16(), MOVED.replace(ascent_dtype="float32"))


def test_the_forward_that_somebody_put_on_a_layer_stays_there():
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    layer, calls = model.bert.encoder.layer[0], []
    own = layer.forward

    def patched(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    layer.forward = patched
    objective = AdversarialObjective(model, MOVED.replace(ascent_depth=1))
    for _ in range(3):
        objective.backward(batch)
    assert layer.forward is patched
    assert len(calls) == 3


def test_kept_perturbations_of_multiple_choice_go_with_their_samples():
    model, batch = tiny_models.make("bert", "choice"), tiny_models.choice_batch()
    objective = AdversarialObjective(model, MOVED.replace(delta_lifetime=2))
    first = objective.backward(batch, samples=range(4))["divergence"]
    order = torch.tensor([2, 0, 3, 1])
    turned = {name: value[order] for name, value in batch.items()}
    torch.testing.assert_close(objective.backward(turned, samples=order)["divergence"], first, rtol=1e-5, atol=0)


def test_a_checkpoint_forgets_perturbations_of_the_training_it_replaces():
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    objective = AdversarialObjective(model, MOVED.replace(delta_lifetime=2))
    state = copy.deepcopy(objective.state_dict())
    expected = objective.backward(batch, samples=range(4))["divergence"]
    objective.load_state_dict(state)
    assert torch.equal(objective.backward(batch, samples=range(4))["divergence"], expected)


@pytest.mark.parametrize(("interval", "check"), [(2, 2), (4, 2), (3, 3), (2, 3)])
def test_the_signal_is_checked_in_steps_that_have_an_adversary(interval, check):
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    config = MOVED.replace(adversarial_interval=interval, signal_check_interval=check, ascent_dtype="bfloat16")
    objective = AdversarialObjective(model, config)
    for _ in range(interval * check):
        objective.backward(batch)
    assert objective.telemetry.read().keys() >= {"signal_ratio", "ascent_cosine"}


def test_rows_that_the_host_knows_are_not_copied_to_the_device(monkeypatch):
    objective = AdversarialObjective(tiny_models.bert(), MOVED.replace(adversarial_fraction=0.5))
    batch = tiny_models.classification_batch()
    objective.backward(batch)
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, lambda *args, **kwargs: pytest.fail("a step copies from the host"))
    objective.backward(batch)
