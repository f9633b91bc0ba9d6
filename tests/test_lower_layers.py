"""ascent_depth: perturbed hidden states, and layers below them that run once."""

import copy

import pytest
import tiny_models
from method_cases import LARGE, check, example, run
from step_oracle import At

from alum_kernels import AdversarialConfig, AdversarialObjective

BASE = AdversarialConfig.alum_finetuning(normalize="linf", fused_head=False, **LARGE)
SECOND_LAYERS = {
    "bert": ("classification", "bert.encoder.layer.1"),
    "gpt2": ("causal_lm", "transformer.h.1"),
    "llama": ("causal_lm", "model.layers.1"),
    "opt": ("causal_lm", "model.decoder.layers.1"),
    "bart": ("seq2seq", "model.encoder.layers.1"),
}


@pytest.mark.parametrize("family", list(SECOND_LAYERS))
def test_it_is_the_step_written_by_hand_at_that_layer(family):
    task, layer = SECOND_LAYERS[family]
    sites = (At(layer, on_input=True),)
    rtol = 1e-5 if family in ("llama", "opt", "bart") else 1e-9  # some norms are fp32 inside
    check(family, task, BASE.replace(ascent_depth=1, steps=2), sites=sites, rtol=rtol)


@pytest.mark.parametrize("dropout", ["shared", "independent", "off"])
def test_lower_layers_run_in_the_clean_pass_alone(dropout):
    model, batch = tiny_models.bert(0.3), tiny_models.classification_batch()
    ran = []
    for index, layer in enumerate(model.bert.encoder.layer):
        layer.attention.register_forward_hook(lambda *_, index=index: ran.append(index))
    AdversarialObjective(model, BASE.replace(ascent_depth=1, steps=2, dropout=dropout)).backward(batch)
    assert (ran.count(0), ran.count(1)) == (1, 4)
    model(**batch)
    assert ran.count(0) == 2, "outside of a step the model is its own"


def test_masks_above_the_site_are_those_of_the_clean_pass():
    model, batch = tiny_models.bert(0.5), tiny_models.classification_batch()
    still = BASE.replace(ascent_depth=1, std=0.0, step_size=0.0, epsilon=0.0)
    assert float(AdversarialObjective(model, still)(**batch).divergence) == 0.0
    assert float(AdversarialObjective(model, still.replace(dropout="independent"))(**batch).divergence) > 0.0


def test_lower_layers_are_trained_by_the_divergence():
    model, batch = example("bert", "classification")
    config = BASE.replace(ascent_depth=1, clean_weight=0.0)
    _, gradients = run("bert", copy.deepcopy(model), batch, config)
    for name in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.output.dense.weight"):
        assert gradients[name].abs().sum() > 0


@pytest.mark.parametrize(
    ("model", "depth", "message"),
    [
        (tiny_models.bert, 2, "expected less than the 2 layers of bert.encoder.layer, got 2"),
        (lambda: tiny_models.make("t5", "seq2seq"), 1, "expected layers that give their hidden state alone"),
    ],
)
def test_models_without_such_a_layer_are_refused(model, depth, message):
    made = model()
    batch = tiny_models.seq2seq_batch() if depth == 1 else tiny_models.classification_batch()
    with pytest.raises(ValueError, match=f"^ascent_depth: {message}"):
        AdversarialObjective(made, BASE.replace(ascent_depth=depth))(**batch)
    made(**batch)


def test_a_model_without_a_list_of_layers_is_refused():
    with pytest.raises(ValueError, match=r"^ascent_depth: BagOfEmbeddings has no list of layers"):
        AdversarialObjective(tiny_models.BagOfEmbeddings(), BASE.replace(ascent_depth=1), head="classification")
