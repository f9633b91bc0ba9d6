"""Every family on every task: one step runs, is what its definition says, and padding plays no part in it."""

import warnings

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective, noise_init
from alum_kernels.adversarial.heads import Head, detect_head
from alum_kernels.adversarial.sites import perturbed_sites

EVERY = [(task, family) for task, families in tiny_models.FAMILIES_OF.items() for family in families]
every_family_and_task = pytest.mark.parametrize(("task", "family"), EVERY, ids=["-".join(pair) for pair in EVERY])
NOISE = AdversarialConfig.r3f(std=0.125)
CLIMBED = AdversarialConfig.alum_finetuning(std=1e-2, step_size=1e-1, epsilon=1e-1, normalize="linf")
# their norms compute in fp32 whatever the model's dtype
FP32_INSIDE = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "t5")


def double(task: str, family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and a batch in float64."""
    batch = {name: x.double() if x.is_floating_point() else x for name, x in tiny_models.batch(task).items()}
    return tiny_models.make(family, task, dtype=torch.float64), batch


def step(model: nn.Module, config: AdversarialConfig, batch: dict[str, Tensor], seed: int = 3, **options):
    """What one step gives, and the gradients."""
    model.zero_grad()
    objective = AdversarialObjective(model, config, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*trained through its logits")
        output = objective.forward(batch, seed=torch.tensor([seed]))
    output.loss.backward()
    objective.remove_hooks()
    return output, tiny_models.Gradients.of(model)


@every_family_and_task
def test_a_step_runs(task, family):
    model, batch = tiny_models.make(family, task), tiny_models.batch(task)
    assert detect_head(model) == Head(tiny_models.HEAD_OF[task])
    output, gradients = step(model, CLIMBED, batch)
    plain = model(**batch).loss
    torch.testing.assert_close(output.task_loss, plain, rtol=1e-5, atol=0, check_dtype=False)
    assert output.divergence > 0
    flat = gradients.flat()
    assert flat.isfinite().all()
    model.zero_grad()
    plain.backward()
    assert not torch.equal(flat, tiny_models.Gradients.of(model).flat())


def both_sides(model: nn.Module, batch: dict[str, Tensor], seed: int) -> list:
    """What the model itself returns, clean and with the noise added to its embeddings."""
    module = perturbed_sites(model)[0].module
    mask = batch["attention_mask"].flatten(0, -2)

    def add(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return noise_init(output, std=NOISE.std, mask=mask, seed=torch.tensor([seed]), backend="reference")

    with torch.no_grad():
        clean = model(**batch)
        handle = module.register_forward_hook(add)
        noisy = model(**batch)
    handle.remove()
    return [noisy, clean]


def symmetric(adv_logits: Tensor, logits: Tensor) -> Tensor:
    log_p, log_q = adv_logits.log_softmax(-1), logits.log_softmax(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def divergence_by_hand(task: str, sides: list, batch: dict[str, Tensor]) -> Tensor:
    """The mean over what is compared, sample by sample and row by row."""
    if task == "spans":
        lengths = batch["attention_mask"].sum(1).tolist()
        total = sum(
            symmetric(*(side[field][sample, :length] for side in sides))
            for field in ("start_logits", "end_logits")
            for sample, length in enumerate(lengths)
        )
        return total / len(lengths)
    adv_logits, logits = (side.logits for side in sides)
    if task == "regression":
        return (adv_logits - logits).square().mean()
    if task in ("classification", "choice"):
        return symmetric(adv_logits, logits).mean()
    labels = batch["labels"]
    shift = 1 if task == "causal_lm" else 0
    rows = [
        symmetric(adv_logits[sample, position - shift], logits[sample, position - shift])
        for sample, position in (labels != -100).nonzero().tolist()
    ]
    return torch.stack(rows).mean()


@every_family_and_task
def test_the_divergence_of_noise_is_the_one_of_the_models_own_logits(task, family):
    model, batch = double(task, family)
    expected = divergence_by_hand(task, both_sides(model, batch, seed=3), batch)
    assert expected > 0
    output, _ = step(model, NOISE.replace(fused_head=False), batch, seed=3)
    torch.testing.assert_close(output.divergence, expected, rtol=1e-9, atol=0)
    if task in ("masked_lm", "causal_lm", "seq2seq"):
        fused, _ = step(model, NOISE, batch, seed=3)
        torch.testing.assert_close(fused.divergence, expected, rtol=1e-7, atol=0)


@every_family_and_task
def test_more_padding_changes_nothing(task, family):
    model, batch = double(task, family)
    more = tiny_models.with_more_padding(batch)
    assert more["input_ids"].shape[-1] == batch["input_ids"].shape[-1] + 2
    # the models' own loss of answers has padding among its classes
    options = {"loss": lambda outputs, _: outputs.start_logits[:, 0].sum()} if task == "spans" else {}
    tolerance = 1e-5 if family in FP32_INSIDE else 1e-7
    for config in (CLIMBED.replace(fused_head=False), CLIMBED):
        output, gradients = step(model, config, batch, **options)
        again, gradients_again = step(model, config, more, **options)
        torch.testing.assert_close(again.divergence, output.divergence, rtol=tolerance, atol=0)
        # losses of language models are computed in fp32
        torch.testing.assert_close(again.task_loss, output.task_loss, rtol=max(tolerance, 1e-6), atol=0)
        flat, flat_again = gradients.flat(), gradients_again.flat()
        assert (flat_again - flat).norm() <= max(tolerance, 1e-6) * flat.norm()
