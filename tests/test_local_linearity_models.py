"""Local linearity of transformers: the same sample by sample, and the gradient of finite differences."""

import copy

import pytest
import tiny_models
import torch
from linearity import NEAR, compare, watched_deltas
from tiny_models import Gradients
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.adversarial.sites import perturbed_sites

TASKS = [
    ("bert", "classification"),
    ("bert", "regression"),
    ("bert", "choice"),
    ("bert", "token_labels"),
    ("bert", "spans"),
    ("bert", "masked_lm"),
    ("gpt2", "causal_lm"),
    ("gpt2", "classification"),
    ("bart", "seq2seq"),
]


def next_token_loss(logits: Tensor, labels: Tensor, vocabulary: int | None = None, **_: object) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def sample_by_sample(model: nn.Module, batch: dict, deltas: list[Tensor], config: AdversarialConfig) -> Tensor:
    """The loss of a step at known perturbations, each sample a batch of its own with the model's own loss."""
    sites = perturbed_sites(model, side=config.side)
    count = batch["labels" if "labels" in batch else "start_positions"].shape[0]
    clean_losses, gammas, slopes = [], [], []
    for index in range(count):
        sample = {name: x[index : index + 1] for name, x in batch.items()}
        own = [delta.view(count, -1, *delta.shape[1:])[index] for delta in deltas]
        embeds = []

        def loss_with(replace, sample=sample):
            handles = [
                site.module.register_forward_hook(lambda _m, _a, output, at=at: replace(at, output))
                for at, site in enumerate(sites)
            ]
            loss = model(**sample).loss
            for handle in handles:
                handle.remove()
            return loss

        clean = loss_with(lambda at, output, embeds=embeds: embeds.append(output))
        grads = torch.autograd.grad(clean, embeds, create_graph=True)
        slope = sum((delta * grad).sum() for delta, grad in zip(own, grads, strict=True))
        reached = loss_with(lambda at, output, own=own: output + own[at])
        clean_losses.append(clean)
        slopes.append(slope.abs())
        gammas.append((reached - clean - slope).abs())
    terms = (config.linearity, gammas), (config.linearity_gradient, slopes)
    counts = labels_of_each(batch)
    return torch.stack([weight * (torch.stack(values) * counts).sum() / counts.sum() for weight, values in terms]).sum()


def labels_of_each(batch: dict[str, Tensor]) -> Tensor:
    """(B,) how many labels each sample's loss is the mean of; a causal model predicts none at its first position."""
    labels = batch.get("labels")
    if labels is None or labels.dim() == 1:
        return torch.ones(len(batch["input_ids"]))
    return (labels != -100).sum(1)


def made(family: str, task: str) -> tuple[nn.Module, dict]:
    """A model and a batch in float64; an answer's padding is left out here, but not by a model's own loss."""
    batch = tiny_models.batch(task)
    if task == "spans":
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        batch["start_positions"][2], batch["end_positions"][2] = 1, 3
    batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    return tiny_models.make(family, task, dtype=torch.float64), batch


@pytest.mark.filterwarnings("ignore:.*trained through its logits")
@pytest.mark.parametrize(("family", "task"), TASKS, ids=["-".join(pair) for pair in TASKS])
def test_transformers_are_the_same_sample_by_sample(family, task, monkeypatch):
    deltas = watched_deltas(monkeypatch)
    model, batch = made(family, task)
    assert model.config._attn_implementation == "sdpa"
    by_hand = copy.deepcopy(model)
    by_hand.set_attn_implementation("eager")
    if task == "causal_lm":
        by_hand.loss_function = next_token_loss  # their own computes in fp32
    config = AdversarialConfig.llr(clean_weight=0.0)
    objective = AdversarialObjective(model, config)
    output = objective(**batch)
    output.loss.backward()
    objective.remove_hooks()
    expected = sample_by_sample(by_hand, batch, deltas, config)
    expected.backward()
    torch.testing.assert_close(output.loss.detach(), expected.detach(), rtol=1e-8, atol=1e-12)
    compare(Gradients.of(model), Gradients.of(by_hand), rtol=1e-6, atol=1e-10)


def test_both_sides_of_an_encoder_decoder(monkeypatch):
    deltas = watched_deltas(monkeypatch)
    model, batch = made("bart", "seq2seq")
    config = AdversarialConfig.llr(clean_weight=0.0, side="both", fused_head=False)
    objective = AdversarialObjective(model, config)
    output = objective(**batch)
    objective.remove_hooks()
    by_hand = copy.deepcopy(model)
    by_hand.set_attn_implementation("eager")
    assert len(deltas) == 2
    expected = sample_by_sample(by_hand, batch, deltas, config)
    torch.testing.assert_close(output.loss.detach(), expected.detach(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_gradient_is_that_of_finite_differences(family):
    model, batch = made(family, "classification")
    torch.manual_seed(0)
    delta = 0.05 * torch.randn(*batch["input_ids"].shape, 16, dtype=torch.float64)
    objective = AdversarialObjective(model, NEAR.replace(steps=0))

    def loss() -> Tensor:
        return objective.forward(batch, delta=[delta]).loss

    loss().backward()
    gradients = Gradients.of(model)
    for name, parameter in model.named_parameters():
        if gradients.values[name] is None:
            continue
        direction = torch.randn_like(parameter)
        size, ends = 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * size * direction)
            ends.append(loss().detach())
            with torch.no_grad():
                parameter.sub_(sign * size * direction)
        measured = (ends[0] - ends[1]) / (2 * size)
        expected = (gradients.values[name] * direction).sum()
        torch.testing.assert_close(expected, measured, rtol=1e-5, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")
