"""Where YOPO's inner steps end: the first layer that is found, and what cannot be one."""

import pytest
import tiny_models
import torch
from tiny_models import FAMILIES
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.adversarial.first_layer import FirstLayer

EXPECTED = {
    "bert": "bert.encoder.layer.0",
    "roberta": "roberta.encoder.layer.0",
    "albert": "albert.encoder.albert_layer_groups.0",
    "electra": "electra.encoder.layer.0",
    "deberta-v2": "deberta.encoder.layer.0",
    "distilbert": "distilbert.transformer.layer.0",
    "modernbert": "model.layers.0",
    "xlm-roberta": "roberta.encoder.layer.0",
    "mpnet": "mpnet.encoder.layer.0",
    "gpt2": "transformer.h.0",
    "opt": "model.decoder.layers.0",
    "llama": "model.layers.0",
    "qwen2": "model.layers.0",
    "qwen3": "model.layers.0",
    "gemma": "model.layers.0",
    "gemma2": "model.layers.0",
    "t5": "transformer.encoder.block.0",
    "bart": "model.encoder.layers.0",
}
YOPO = AdversarialConfig.yopo(std=0.1, step_size=0.1, epsilon=0.3, fused_head=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layer_of_every_family(family):
    model = tiny_models.make(family, "classification")
    assert FirstLayer(model).name == EXPECTED[family]
    objective = AdversarialObjective(model, YOPO)
    objective.backward(tiny_models.batch("classification"))
    assert tiny_models.Gradients.of(model).flat().isfinite().all()


def test_each_side_of_an_encoder_decoder_has_its_own():
    deeper = {"bart": {"decoder_layers": 4}, "t5": {"num_decoder_layers": 4}}
    for family, (encoder, decoder) in {
        "bart": ("model.encoder.layers.0", "model.decoder.layers.0"),
        "t5": ("encoder.block.0", "decoder.block.0"),
    }.items():
        model = tiny_models.make(family, "seq2seq", **deeper[family])
        assert FirstLayer(model).name == encoder
        assert FirstLayer(model, decoder=True).name == decoder
        for side in ("encoder", "decoder"):
            objective = AdversarialObjective(model, YOPO.replace(side=side))
            objective.backward(tiny_models.batch("seq2seq"))
            objective.remove_hooks()


def test_a_list_within_a_layer_is_none_of_layers():
    """T5's block is a list of an attention and the rest, longer than that of one block."""
    model = tiny_models.make("t5", "seq2seq", num_layers=1, num_decoder_layers=1)
    assert FirstLayer(model).name == "encoder.block.0"
    assert FirstLayer(model, decoder=True).name == "decoder.block.0"


def test_a_layer_that_runs_several_times_counts_where_it_runs_first():
    """ALBERT's: the gradient to the first run's output, and that run alone again."""
    model = tiny_models.make("albert", "classification", dtype=torch.float64)
    batch, layer = tiny_models.batch("classification"), FirstLayer(model)
    runs, outputs, gradients = [], [], []

    def keep(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)
        outputs[-1].retain_grad()

    handle = model.get_submodule(layer.name).register_forward_hook(keep)
    layer.with_gradient(lambda: model(**batch).loss, gradients).backward()
    handle.remove()
    assert len(outputs) == len(gradients) == 2
    assert torch.equal(gradients[-1], outputs[0].grad)
    assert not torch.equal(gradients[0], outputs[0].grad)

    inner = model.get_submodule(layer.name)
    inner.register_forward_hook(lambda *_: runs.append(1))
    (gradient,) = layer.gradient(
        lambda: model(**batch), [model.albert.embeddings.word_embeddings.weight], gradients[-1]
    )
    assert gradient.abs().max() > 0
    assert len(runs) <= 1


def test_what_is_no_first_layer():
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    with pytest.raises(ValueError, match=r"^first_layer: BertForSequenceClassification has no module named 'layer'"):
        FirstLayer(model, "layer")
    with pytest.raises(ValueError, match=r"^first_layer: Linear has no list of layers; name the module"):
        FirstLayer(nn.Linear(2, 2))
    words = model.bert.embeddings.word_embeddings.weight
    layer = FirstLayer(model, "bert.encoder.layer.0")
    with pytest.raises(ValueError, match=r"^first_layer: bert\.encoder\.layer\.0 did not run in a forward pass"):
        layer.gradient(lambda: model.bert.embeddings(batch["input_ids"]), [words], torch.ones(4, 7, 16))
    with pytest.raises(ValueError, match=r"^first_layer: the output of bert\.encoder\.layer\.0 does not depend on"):
        layer.gradient(lambda: model(**batch), [model.classifier.weight], torch.ones(4, 7, 16))
    # after an early end the model runs to its own end again
    assert model(**batch).logits.shape == (4, 3)
    whole = FirstLayer(model, "bert")
    with pytest.raises(TypeError, match=r"^first_layer: expected bert to give a tensor, got BaseModelOutput"):
        whole.with_gradient(lambda: model(**batch), [])
