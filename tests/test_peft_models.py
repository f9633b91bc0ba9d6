"""LoRA adapters (PEFT) under every kind of step: their gradients are those that the plain model's weights make them.

W' = W + s B A        dB = s dW' A^T        dA = s B^T dW'        dW' of the plain model with W' in W's place
"""

import warnings

import pytest
import tiny_models
import torch
from test_training_options import METHODS, every_method, step
from tiny_models import Gradients
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective

peft = pytest.importorskip("peft")

TARGETS = {
    "classification": ["query", "value", "word_embeddings"],
    "masked_lm": ["query", "value"],
    "causal_lm": ["q_proj", "v_proj"],
}
RANK = 2


def models(task: str, *targets: str, task_type: str | None = None, **options) -> tuple[nn.Module, nn.Module]:
    """A model with adapters that are not zero, and the plain one that computes the same."""
    family = "opt" if task == "causal_lm" else "bert"
    plain, base = (tiny_models.make(family, task, dtype=torch.float64, **options) for _ in range(2))
    targets = list(targets) or TARGETS[task]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights
        adapted = peft.get_peft_model(base, peft.LoraConfig(task_type=task_type, r=RANK, target_modules=targets))
    torch.manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dim() == 2:
            parameter.data = 0.1 * torch.randn(parameter.shape, dtype=torch.float64)
    for name, module in plain.named_modules():
        layer = adapted.get_base_model().get_submodule(name)
        if (pair := adapter_of(layer)) is not None:
            a, b, scale = pair
            update = scale * b @ a
            module.weight.data += update if isinstance(module, nn.Linear) else update.T
        elif hasattr(layer, "modules_to_save"):
            module.load_state_dict(layer.modules_to_save["default"].state_dict())
    return adapted, plain


def adapter_of(layer: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """A, B and s of an adapted layer."""
    if not isinstance(layer, peft.tuners.lora.LoraLayer):
        return None
    scale = layer.scaling["default"]
    if layer.lora_embedding_A:
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"], scale
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight, scale


def assert_same(adapted: nn.Module, plain: nn.Module) -> None:
    """The gradients of ``adapted`` are those that those of ``plain`` make them."""
    checked = 0
    for name, module in plain.named_modules():
        layer = adapted.get_base_model().get_submodule(name)
        if (pair := adapter_of(layer)) is not None:
            (a, b, scale), grad = pair, module.weight.grad
            grad = grad if isinstance(module, nn.Linear) else grad.T
            assert grad.abs().max() > 1e-7
            torch.testing.assert_close(a.grad, scale * b.T @ grad, rtol=1e-8, atol=1e-12)
            torch.testing.assert_close(b.grad, scale * grad @ a.T, rtol=1e-8, atol=1e-12)
            checked += 2
        elif hasattr(layer, "modules_to_save"):
            for own, other in zip(layer.modules_to_save["default"].parameters(), module.parameters(), strict=True):
                torch.testing.assert_close(own.grad, other.grad, rtol=1e-8, atol=1e-12)
                checked += 1
    found = [grad for grad in Gradients.of(adapted).values.values() if grad is not None]
    assert len(found) == checked > 0


@every_method
@pytest.mark.parametrize("task", TARGETS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_adapters_have_the_gradients_of_the_plain_model(method, task, checkpointed):
    adapted, plain = models(task, task_type={"classification": "SEQ_CLS", "causal_lm": "CAUSAL_LM"}.get(task))
    if checkpointed:
        adapted.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    batch = tiny_models.batch(task)
    for model in (adapted, plain):
        objective = AdversarialObjective(model, METHODS[method])
        assert objective.head.name == task
        assert (objective.linear_head is None) == (task == "classification")
        step(objective, batch)
    assert_same(adapted, plain)


@every_method
def test_an_adapter_on_the_head_goes_through_the_logits(method):
    adapted, plain = models("causal_lm", "q_proj", "lm_head", task_type="CAUSAL_LM", tie_word_embeddings=False)
    batch = tiny_models.batch("causal_lm")
    with pytest.warns(UserWarning, match=r"its output embeddings are a peft\..*Linear"):
        objective = AdversarialObjective(adapted, METHODS[method])
    assert objective.linear_head is None
    step(objective, batch)
    step(AdversarialObjective(plain, METHODS[method].replace(fused_head=False)), batch)
    assert_same(adapted, plain)


def test_a_wrapper_for_no_task_has_the_head_of_its_model():
    adapted, _ = models("masked_lm")
    assert type(adapted).__name__ == "PeftModel"
    objective = AdversarialObjective(adapted, AdversarialConfig.pgd())
    assert objective.head.name == "masked_lm"
    assert objective.linear_head is not None
