"""What local linearity refuses: losses, heads, models, tensors and settings that it could not serve."""

from types import SimpleNamespace

import pytest
import tiny_models
import torch
from linearity import NEAR
from tiny_models import BagOfEmbeddings
from torch import Tensor

from alum_kernels import AdversarialConfig, AdversarialObjective


def test_losses_that_cannot_be_taken_apart_are_refused():
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    with pytest.raises(ValueError, match=r"^loss: expected the model's own loss with ascent='linearity'"):
        AdversarialObjective(model, NEAR, loss=lambda outputs, _: outputs.logits.sum())
    objective = AdversarialObjective(model, NEAR)
    with pytest.raises(ValueError, match=r"^run_task: expected the model's own loss"):
        objective.forward(batch, run_task=lambda *_: (torch.zeros(()), None))

    def run_task(model, batch) -> tuple[Tensor, SimpleNamespace]:
        outputs = model(**batch)
        return outputs.loss, outputs

    output = objective.forward(batch, run_task=run_task, standard_loss=True)
    assert output.loss > output.task_loss
    with pytest.raises(ValueError, match=r"^model: no head recognised for BagOfEmbeddings"):
        AdversarialObjective(BagOfEmbeddings(), NEAR.replace(modules=("embed",)))


def test_what_has_no_second_derivative_is_refused():
    model = tiny_models.bert()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"^model: expected attn_implementation 'sdpa' .*got 'flash_attention_2'"):
        AdversarialObjective(model, NEAR)
    AdversarialObjective(model, AdversarialConfig())
    compiled = tiny_models.bert()
    compiled.bert.encoder.compile(backend="aot_eager")
    with pytest.raises(RuntimeError, match="double backward"):
        AdversarialObjective(compiled, NEAR)(**tiny_models.classification_batch()).loss.backward()


def test_a_fused_head_is_refused():
    model = tiny_models.bert_masked_lm()
    with pytest.raises(ValueError, match=r"^fused_head: .*differentiated twice"):
        AdversarialObjective(model, NEAR.replace(fused_head=True))
    with pytest.warns(UserWarning, match="trained through its logits: its loss is differentiated twice"):
        AdversarialObjective(model, NEAR)


def test_tensors_without_the_samples_own_rows_are_refused():
    batch = tiny_models.classification_batch()
    del batch["attention_mask"]
    objective = AdversarialObjective(tiny_models.bert(), NEAR.replace(modules=("bert.embeddings.position_embeddings",)))
    with pytest.raises(ValueError, match=r"^modules: expected the same number of rows .*got shape \(1, 7, 16\)"):
        objective(**batch)
    names = ("bert.embeddings.word_embeddings", "bert.embeddings.LayerNorm")
    objective = AdversarialObjective(tiny_models.bert(), NEAR.replace(modules=names))
    with pytest.raises(ValueError, match=r"do not depend on the perturbed output of bert\.embeddings\.word_embeddings"):
        objective(**batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linearity": -1.0}, "^linearity: expected"),
        ({"linearity_gradient": float("nan")}, "^linearity_gradient: expected"),
        ({"linearity": 0.0, "linearity_gradient": 0.0}, "^linearity, linearity_gradient: expected one of them > 0"),
        ({"ascent": "task"}, "^linearity, linearity_gradient: .*ascent='task'"),
        ({"alpha": 1.0}, "^alpha, adversarial_weight: expected 0 with ascent='linearity'"),
        ({"adversarial_weight": 1.0}, "^alpha, adversarial_weight: expected 0"),
        ({"backward": "accumulate"}, "^backward: "),
        ({"std": 0.0}, "^std: expected a number > 0 with ascent='linearity'"),
    ],
)
def test_settings_that_no_step_could_follow_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AdversarialConfig.llr(**changes)
