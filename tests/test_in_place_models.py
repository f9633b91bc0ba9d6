"""Models that change the output of their embeddings in place, and modules that lie where they cannot be perturbed."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from alum_kernels import AdversarialConfig, AdversarialObjective, noise_init, projected_ascent
from alum_kernels.evaluation.robustness import accuracy_under_attack

CONFIG = AdversarialConfig.alum_finetuning(normalize="linf", std=1e-2, epsilon=1e-2, step_size=1e-2, modules=("embed",))


class Classifier(nn.Module):
    """Adds positions to its embeddings, in place or not, and may recompute everything in the backward."""

    def __init__(self, in_place: bool, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.positions = nn.Parameter(torch.randn(5, 8))
        self.in_place, self.checkpointed = in_place, checkpointed

    def body(self, input_ids):
        x = self.embed(input_ids)
        if self.in_place:
            x += self.positions
        else:
            x = x + self.positions
        return self.out(self.inner(x).tanh().mean(1))

    def forward(self, input_ids):
        return checkpoint(self.body, input_ids, use_reentrant=False) if self.checkpointed else self.body(input_ids)


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"input_ids": torch.randint(20, (4, 5)), "labels": torch.tensor([0, 1, 2, 1])}


def cross_entropy(logits, inputs):
    return nn.functional.cross_entropy(logits, inputs["labels"])


def objective(model: nn.Module, config: AdversarialConfig = CONFIG) -> AdversarialObjective:
    return AdversarialObjective(model, config, head="classification", loss=cross_entropy)


def test_a_model_may_change_its_embeddings_in_place():
    gradients = []
    for in_place in (False, True):
        model = Classifier(in_place)
        objective(model)(**batch()).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, changed in zip(*gradients, strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(changed, plain)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("method", ["freelb", "fgm", "yopo", "freeat", "pgd"])
def test_methods_that_train_on_the_way_see_a_change_in_place(method, frozen):
    config = getattr(AdversarialConfig, method)(modules=("embed",), std=0.05, step_size=0.1, epsilon=0.1)
    config = config.replace(first_layer="inner") if method == "yopo" else config
    gradients = []
    for in_place in (False, True):
        model = Classifier(in_place)
        model.embed.requires_grad_(not frozen)
        model.positions.requires_grad_(not frozen)
        options = {"update": lambda: None} if method == "freeat" else {}
        objective(model, config).backward(batch(), **options)
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for plain, changed in zip(*gradients, strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(changed, plain)


class Recomputed(nn.Module):
    """Embeddings, and a body with dropout that is recomputed in the backward, or not."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out, self.drop = nn.Embedding(20, 8), nn.Linear(8, 3), nn.Dropout(0.5)
        self.checkpointed = checkpointed

    def forward(self, input_ids):
        def body(x):
            return self.out(self.drop(x.tanh()).mean(1))

        embeds = self.embed(input_ids)
        return checkpoint(body, embeds, use_reentrant=False) if self.checkpointed else body(embeds)


@pytest.mark.parametrize("method", ["alum_finetuning", "neftune", "freelb"])
def test_dropout_that_is_off_is_off_in_what_a_backward_recomputes(method):
    config = getattr(AdversarialConfig, method)(dropout="off", modules=("embed",))
    gradients = []
    for checkpointed in (False, True):
        model = Recomputed(checkpointed).train()
        objective(model, config).backward(batch())
        assert all(module.training for module in model.modules())
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_an_attack_may_be_changed_in_place():
    reports = [
        accuracy_under_attack(Classifier(in_place), [batch()], epsilon=0.1, modules=("embed",), head="classification")
        for in_place in (False, True)
    ]
    assert reports[0].attacked_loss > reports[0].clean_loss
    assert reports[1].attacked_loss == pytest.approx(reports[0].attacked_loss, rel=1e-6)


@pytest.mark.parametrize("backend", ["reference", None])
def test_results_may_be_changed_in_place(backend):
    embeds = torch.randn(2, 3, 4, requires_grad=True)
    noisy = noise_init(embeds, seed=1, backend=backend)
    noisy *= 2
    climbed = projected_ascent(embeds, torch.randn(2, 3, 4), seed=1, step_size=1.0, epsilon=1.0, backend=backend)
    climbed.mul_(3)
    (noisy.sum() + climbed.sum()).backward()
    torch.testing.assert_close(embeds.grad, torch.full((2, 3, 4), 5.0))


def test_a_checkpointed_module_is_refused_and_not_trained_wrongly():
    with pytest.raises(RuntimeError, match=r"embed: ran again inside a backward, so it lies in a checkpointed segment"):
        objective(Classifier(in_place=False, checkpointed=True))(**batch()).loss.backward()


def test_a_perturbed_module_that_another_one_replaces_is_named():
    config = CONFIG.replace(modules=("embed", "inner"))
    with pytest.raises(ValueError, match="do not depend on the perturbed output of embed"):
        objective(Classifier(in_place=False), config)(**batch())
