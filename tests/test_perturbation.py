"""What is perturbed, and where not: masks, padding, several modules, and the precision of training."""

import pytest
import tiny_models
import torch
from climbed import Climbed
from tiny_models import Gradients
from torch import Tensor

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.backends.reference import noise_init as reference_noise

MOVED = AdversarialConfig(std=1e-2, step_size=2e-2, epsilon=2e-2, normalize="linf")
STILL = AdversarialConfig(std=0.0, step_size=0.0, epsilon=0.0)


def deltas_of(model, objective: AdversarialObjective, names: tuple[str, ...], batch: dict, **options) -> list[Tensor]:
    """Final minus clean output of the named modules, in a step."""
    outputs = {name: [] for name in names}
    modules = dict(model.named_modules(remove_duplicate=False))
    handles = [
        # after the objective's own hooks, so that what the rest of the model receives is seen
        modules[name].register_forward_hook(lambda m, args, output, name=name: outputs[name].append(output.detach()))
        for name in names
    ]
    objective.forward(batch, **options)
    for handle in handles:
        handle.remove()
    return [seen[-1] - seen[0] for seen in outputs.values()]


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("name", tiny_models.CLASSIFIERS)
def test_padding_stays_as_it_is_and_every_token_moves(name, steps):
    model, batch = tiny_models.CLASSIFIERS[name](), tiny_models.classification_batch()
    objective = AdversarialObjective(model, MOVED.replace(steps=steps))
    (delta,) = deltas_of(model, objective, objective._runner.hooks.names, batch)
    valid = batch["attention_mask"] == 1
    assert (delta[~valid] == 0).all()
    assert (delta[valid] != 0).any(-1).all()
    if steps:
        assert delta.abs().max() <= 2e-2 * (1 + 1e-5)


def padded(batch: dict, columns: int) -> dict:
    fill = {"input_ids": tiny_models.PADDING, "attention_mask": 0, "labels": -100}
    return {
        key: value if value.dim() == 1 else torch.cat([value, value.new_full((len(value), columns), fill[key])], dim=1)
        for key, value in batch.items()
    }


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("make", [tiny_models.bert, tiny_models.roberta, tiny_models.bart, tiny_models.bert_masked_lm])
def test_more_padding_changes_nothing(make, level):
    masked_lm = make is tiny_models.bert_masked_lm
    batch = tiny_models.masked_lm_batch() if masked_lm else tiny_models.classification_batch()
    results = []
    for columns in (0, 5):
        model = make().double()
        objective = AdversarialObjective(model, MOVED.replace(level=level, alpha=10.0, steps=2))
        output = objective.forward(padded(batch, columns), seed=torch.tensor([3]))
        output.loss.backward()
        results.append((output.divergence, Gradients.of(model).flat()))
    assert results[0][0] > 0
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-9, atol=0)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-7, atol=1e-11)


WORDS, TYPES = "bert.embeddings.word_embeddings", "bert.embeddings.token_type_embeddings"


def test_two_modules_get_noise_of_their_own_and_climb_together():
    batch = {**tiny_models.classification_batch(), "token_type_ids": torch.zeros(4, 7, dtype=torch.long)}
    seed = torch.tensor([12])
    model = tiny_models.bert().double()
    still = AdversarialObjective(model, MOVED.replace(steps=0, modules=(WORDS, TYPES)))
    noises = deltas_of(model, still, (WORDS, TYPES), batch, seed=seed, sample_offset=3)
    for stream, noise in enumerate(noises):
        expected = reference_noise.initial_delta(
            noise.shape,
            seed,
            torch.float64,
            std=torch.tensor(1e-2).item(),
            mask=batch["attention_mask"],
            distribution="normal",
            stream=stream,
            sample_offset=3,
        )
        torch.testing.assert_close(noise, expected, rtol=0, atol=1e-15)
    still.remove_hooks()
    climbing = AdversarialObjective(model, MOVED.replace(modules=(WORDS, TYPES)))
    climbed = deltas_of(model, climbing, (WORDS, TYPES), batch, seed=seed, sample_offset=3)
    for noise, delta in zip(noises, climbed, strict=True):
        assert (delta != noise).any(-1)[batch["attention_mask"] == 1].all()
    assert climbing.telemetry.read()["ascent_gain"] > 1.5
    climbing.remove_hooks()
    one = AdversarialObjective(model, MOVED.replace(modules=(WORDS,)))
    assert torch.equal(deltas_of(model, one, (TYPES,), batch)[0], torch.zeros(4, 7, 16, dtype=torch.float64))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_can_be_perturbed_at_both_ends(name):
    prefix = {"t5": "transformer", "bart": "model"}[name]
    names = (f"{prefix}.encoder.embed_tokens", f"{prefix}.decoder.embed_tokens")
    model, batch = tiny_models.CLASSIFIERS[name](), tiny_models.classification_batch()
    objective = AdversarialObjective(model, MOVED.replace(modules=names))
    encoder, decoder = deltas_of(model, objective, names, batch)
    assert encoder.abs().max() > 0
    assert decoder.abs().max() > 0
    assert not torch.equal(encoder, decoder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_climbs_and_trains_as_fp32_does(monkeypatch, dtype):
    climbed = Climbed(monkeypatch)
    batch, results = tiny_models.classification_batch(), []
    config = MOVED.replace(std=5e-2, epsilon=0.2, step_size=0.1)
    for enabled in (False, True):
        model = tiny_models.bert()
        objective = AdversarialObjective(model, config)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            output = objective.forward(batch, seed=torch.tensor([3]))
        output.loss.backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
        results.append((output.divergence, Gradients.of(model).flat()))
    exact, rounded = climbed.gradients
    assert exact.dtype == rounded.dtype == torch.float32
    # a gradient still multiplied by the fp16 factor would be 16384 times as long
    assert torch.cosine_similarity(exact.flatten(), rounded.flatten(), 0) > 0.98
    assert 0.9 < rounded.norm() / exact.norm() < 1.1
    assert 0.8 < results[1][0] / results[0][0] < 1.25
    assert torch.cosine_similarity(results[0][1], results[1][1], 0) > 0.98


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_a_still_perturbation_still(dtype):
    objective = AdversarialObjective(tiny_models.bert(0.3), STILL)
    with torch.autocast("cpu", dtype=dtype):
        assert objective(**tiny_models.classification_batch()).divergence == 0


def test_a_bf16_model_trains_and_says_what_its_embeddings_lost():
    model, batch = tiny_models.bert().bfloat16(), tiny_models.classification_batch()
    objective = AdversarialObjective(model, MOVED.replace(std=1e-5, epsilon=1e-5, step_size=1e-5))
    output = objective(**batch)
    output.loss.backward()
    assert output.divergence.dtype == torch.float32
    assert torch.isfinite(Gradients.of(model).flat()).all()
    assert objective.telemetry.read()["unrepresentable"] > 0.5
