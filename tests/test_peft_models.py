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

from alum_kernels import AdversarialConfig, AdversarialObjective, noise_init, projected_ascent, symmetric_kl
from alum_kernels.adversarial.heads import Head
from alum_kernels.evaluation import accuracy_under_attack

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


# prompts: virtual tokens before those of the batch

VIRTUAL = 3
PROMPTS = {
    "prompt tuning": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL),
    "p-tuning": lambda task: peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=VIRTUAL, encoder_hidden_size=8
    ),
}
CLIMB = {"step_size": 2e-2, "epsilon": 2e-2, "norm": "linf", "normalize": "linf", "level": "token"}
SEED = torch.tensor([5])


def prompted(prompt: str, family: str = "llama", task: str = "causal_lm", task_type: str = "CAUSAL_LM") -> nn.Module:
    base = tiny_models.make(family, task, dtype=torch.float64)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the class of the base model
        return peft.get_peft_model(base, PROMPTS[prompt](task_type)).double()


def step_by_hand(model: nn.Module, batch: dict[str, Tensor], alpha: float) -> tuple[Tensor, Tensor]:
    """Task loss and divergence of one ALUM step, the prompt in front of perturbed tokens.

    Each token is predicted by the position before it, the first one by the last of the prompt.
    """
    labels, mask = batch["labels"], batch["attention_mask"]
    counted = labels != -100
    embeds = model.get_base_model().get_input_embeddings()(batch["input_ids"])
    led = torch.nn.functional.pad(mask, (VIRTUAL, 0), value=1)

    def rows(tokens: Tensor) -> Tensor:
        whole = torch.cat([model.get_prompt(len(labels)), tokens], 1)
        logits = model.get_base_model()(inputs_embeds=whole, attention_mask=led).logits
        return logits[:, VIRTUAL - 1 : -1][counted]

    noise = {"std": 1e-2, "seed": SEED, "mask": mask}
    start = noise_init(embeds.detach(), **noise).requires_grad_()
    clean = rows(embeds)
    climbed = symmetric_kl(rows(start), clean.detach(), reduction="sum")
    (grad,) = torch.autograd.grad(climbed, start)
    adv = rows(projected_ascent(embeds, grad, **noise, **CLIMB))
    task = torch.nn.functional.cross_entropy(clean, labels[counted])
    divergence = symmetric_kl(adv, clean)
    (task + alpha * divergence).backward()
    return task.detach(), divergence.detach()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_trained_by_the_step_written_by_hand(prompt, fused, family):
    model, twin = (prompted(prompt, family) for _ in range(2))
    batch = tiny_models.batch("causal_lm")
    batch["labels"][1:, 0] = batch["input_ids"][1:, 0]  # tokens that the prompt alone predicts
    assert (batch["attention_mask"] == 0).any()
    objective = AdversarialObjective(model, AdversarialConfig(alpha=2.0, std=1e-2, fused_head=fused, **CLIMB))
    assert objective.head == Head("causal_lm", leading=VIRTUAL)
    figures = objective.backward(batch, seed=SEED, sample_offset=0)
    task, divergence = step_by_hand(twin, batch, alpha=2.0)
    # the models' own losses are fp32
    torch.testing.assert_close(figures["task_loss"], task, rtol=1e-6, atol=0, check_dtype=False)
    torch.testing.assert_close(figures["divergence"], divergence, rtol=1e-6, atol=0, check_dtype=False)
    assert divergence > 1e-6
    trained = 0
    for (name, own), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if own.requires_grad:
            assert other.grad.abs().max() > 1e-4
            worst = (own.grad - other.grad).abs().max() / other.grad.abs().max()
            assert worst < 1e-6, name
            trained += 1
    assert trained > 0


def test_the_rows_of_a_prompt_are_counted_with_and_without_labels():
    batch = {"labels": torch.tensor([[4, 5, -100]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    head = Head("causal_lm", leading=2)
    assert head.labels(batch).tolist() == [[-100, 4, 5, -100, -100]]
    assert head.row_mask(batch).tolist() == [[False, True, True, False, False]]
    assert head.row_mask(batch, "all").tolist() == [[False, False, True, True, False]]
    assert int(head.row_count(batch)) == 2
    assert head.row_mask({"labels": batch["labels"]}, "all").tolist() == [[False, False, True, True, True]]
    tagged = Head("token_classification", leading=2)
    assert tagged.labels(batch).tolist() == [[-100, -100, 4, 5, -100]]


def test_a_prompt_is_evaluated_as_it_is_trained():
    model, batch = prompted("prompt tuning").eval(), tiny_models.batch("causal_lm")
    report = accuracy_under_attack(model, [batch], epsilon=1e-3, steps=1)
    assert report.rows == int((batch["labels"] != -100).sum())
    assert report.clean_loss == pytest.approx(model(**batch).loss.item(), rel=1e-6)  # which is fp32
    assert report.attacked_loss > report.clean_loss


def test_prompts_whose_predictions_cannot_be_told_apart_are_refused_where_any_are_compared():
    model = prompted("prompt tuning", "t5", "seq2seq", "SEQ_2_SEQ_LM")
    for name in ("alum_finetuning", "llr", "r3f", "pgd", "freelb"):
        config = getattr(AdversarialConfig, name)(modules=("base_model.shared",))
        if config.compares:
            with pytest.raises(ValueError, match=r"^model: expected a seq2seq_lm model .* 3 virtual tokens of PEFT's"):
                AdversarialObjective(model, config, head="seq2seq_lm")
        else:
            AdversarialObjective(model, config)
