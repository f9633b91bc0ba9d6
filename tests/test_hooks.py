"""The hooks: a perturbation of zero changes nothing, and outside a pass they do nothing at all."""

import pytest
import tiny_models
import torch
from processes import group_of_one
from torch import nn

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.adversarial.hooks import PerturbationHooks
from alum_kernels.adversarial.model_state import RandomState, dropout_off, unwrap
from alum_kernels.adversarial.sites import Site, perturbed_sites

STILL = AdversarialConfig(std=0.0, step_size=0.0, epsilon=0.0)
MOVED = AdversarialConfig(std=1e-2, step_size=1e-2, epsilon=2e-2, normalize="sign")


def logits_of_passes(model: nn.Module, config: AdversarialConfig, batch: dict, **options) -> list[torch.Tensor]:
    """Logits of every pass of one step, the clean one first."""
    seen = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output.logits.detach().clone()))
    objective = AdversarialObjective(model, config, **options)
    objective(**batch)
    objective.remove_hooks()
    handle.remove()
    return seen


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("name", tiny_models.CLASSIFIERS)
def test_delta_zero_gives_the_clean_logits_bit_for_bit(name, steps):
    model, batch = tiny_models.CLASSIFIERS[name](), tiny_models.classification_batch()
    plain = model(**batch).logits
    clean, *perturbed = logits_of_passes(model, STILL.replace(steps=steps), batch)
    assert torch.equal(clean, plain)
    assert len(perturbed) == steps + 1
    for logits in perturbed:
        assert torch.equal(logits, plain)


@pytest.mark.parametrize("name", tiny_models.CLASSIFIERS)
def test_delta_changes_the_logits_of_every_sample(name):
    model, batch = tiny_models.CLASSIFIERS[name](), tiny_models.classification_batch()
    plain = model(**batch).logits
    clean, *perturbed = logits_of_passes(model, MOVED, batch)
    assert torch.equal(clean, plain)
    for logits in perturbed:
        assert (logits != plain).any(-1).all()


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_delta_zero_gives_the_clean_logits_of_a_masked_lm(steps):
    model, batch = tiny_models.bert_masked_lm(), tiny_models.masked_lm_batch()
    clean, *perturbed = logits_of_passes(model, STILL.replace(steps=steps, fused_head=False), batch)
    assert all(torch.equal(logits, clean) for logits in perturbed)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_delta_zero_gives_the_clean_hidden_states_of_a_masked_lm(steps, monkeypatch):
    """Where its logits are not formed: what its projection is given, and the few logits that it still gives."""
    model, batch = tiny_models.bert_masked_lm(), tiny_models.masked_lm_batch()
    hidden = []
    model.cls.predictions.transform.register_forward_hook(lambda module, args, output: hidden.append(output.detach()))
    logits_of_passes(model, STILL.replace(steps=steps), batch)
    *_, clean = hidden[: len(hidden) - steps - 1]
    assert all(torch.equal(states, clean) for states in hidden[-steps - 1 :])


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_is_perturbed_at_its_encoder(name):
    model = tiny_models.CLASSIFIERS[name]()
    (site,) = perturbed_sites(model)
    assert site.module is model.get_encoder().embed_tokens
    calls = []
    if model.get_input_embeddings() is not model.get_encoder().embed_tokens:
        model.get_input_embeddings().register_forward_hook(lambda *args: calls.append(args))
        model(**tiny_models.classification_batch())
        assert not calls


class Twice(nn.Module):
    def __init__(self, calls: int) -> None:
        super().__init__()
        self.embed, self.out, self.calls = nn.Embedding(9, 4), nn.Linear(4, 2), calls

    def forward(self, input_ids):
        return self.out(sum((self.embed(input_ids) for _ in range(self.calls)), torch.zeros(1, 1, 4)).mean(1))


@pytest.mark.parametrize("calls", [0, 2])
def test_a_module_that_runs_not_exactly_once_is_named(calls):
    objective = AdversarialObjective(
        Twice(calls), MOVED.replace(modules=("embed",)), head="classification", loss=lambda logits, _: logits.sum()
    )
    with pytest.raises(
        RuntimeError, match=f"^embed: expected to run exactly once in a forward pass, ran {calls} times"
    ):
        objective(input_ids=torch.zeros(2, 3, dtype=torch.long))


def test_an_output_that_is_no_embedding_is_named():
    model = tiny_models.bert()
    objective = AdversarialObjective(model, MOVED.replace(modules=("classifier",)))
    with pytest.raises(TypeError, match=r"^classifier: expected a floating-point \(B, S, H\) output to perturb"):
        objective(**tiny_models.classification_batch())


class FailsInPass(nn.Module):
    """A classifier that raises in its n-th forward pass."""

    def __init__(self, fatal: int) -> None:
        super().__init__()
        self.inner, self.fatal, self.passes = tiny_models.BagOfEmbeddings(), fatal, 0

    def forward(self, **inputs):
        embeds = self.inner.embed(inputs["input_ids"])
        self.passes += 1
        if self.passes == self.fatal:
            raise ArithmeticError("in the pass")
        return self.inner.body(embeds, inputs["attention_mask"])


@pytest.mark.parametrize("fatal", [1, 2, 3])
def test_an_exception_in_any_pass_leaves_the_hooks_inert(fatal):
    model = FailsInPass(fatal)
    objective = AdversarialObjective(
        model,
        MOVED.replace(modules=("inner.embed",), dropout="off"),
        head="classification",
        loss=lambda logits, batch: nn.functional.cross_entropy(logits, batch["labels"]),
    )
    batch = tiny_models.classification_batch()
    with pytest.raises(ArithmeticError, match="in the pass"):
        objective(**batch)
    assert model.passes == fatal
    assert model.training
    output = model.inner(batch["input_ids"], batch["attention_mask"])
    assert torch.equal(output, model.inner.body(model.inner.embed.weight[batch["input_ids"]], batch["attention_mask"]))
    objective(**batch).loss.backward()


def test_between_passes_and_after_removal_the_model_is_its_own():
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    plain = model(**batch).logits
    objective = AdversarialObjective(model, MOVED)
    objective(**batch).loss.backward()
    assert torch.equal(model(**batch).logits, plain)
    assert len(model.bert.embeddings.word_embeddings._forward_hooks) == 1
    objective.remove_hooks()
    assert not model.bert.embeddings.word_embeddings._forward_hooks


def test_recording_keeps_what_the_module_gave_and_hands_on_a_copy():
    embed = nn.Embedding(9, 4)
    hooks = PerturbationHooks([Site("embed", embed)])
    with hooks.recording() as recorded:
        output = embed(torch.tensor([[1, 2]]))
    assert torch.equal(recorded[0], output)
    assert recorded[0].data_ptr() != output.data_ptr()
    kept = recorded[0].detach().clone()
    output.mul_(2)  # as a model may
    assert torch.equal(recorded[0], kept)
    recorded[0].sum().backward()
    assert embed.weight.grad.sum() == 2 * 4


def test_a_known_embedding_is_not_looked_up_again():
    embed = nn.Embedding(9, 4)
    hooks = PerturbationHooks([Site("embed", embed)])
    known = torch.randn(1, 2, 4)
    with hooks.replacing(lambda index, tensor: 2 * tensor, [known]):
        given = embed(torch.tensor([[1, 200]]))  # of a word that there is not
    assert torch.equal(given, 2 * known)
    assert torch.equal(embed(torch.tensor([[1, 2]])), embed.weight[[1, 2]].unsqueeze(0))


def test_dropout_off_gives_every_submodule_its_own_mode_back():
    model = tiny_models.bert(0.5)
    model.bert.encoder.layer[0].eval()
    before = [module.training for module in model.modules()]
    with dropout_off(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    assert True in before
    assert False in before


def test_random_state_repeats_what_dropout_draws():
    state = RandomState(torch.device("cpu"))
    first = torch.rand(3)
    state.restore()
    assert torch.equal(torch.rand(3), first)


def test_unwrap_sees_through_distributed_data_parallel_only(tmp_path):
    model = tiny_models.BagOfEmbeddings()
    assert unwrap(model) is model
    with group_of_one(tmp_path):
        assert unwrap(nn.parallel.DistributedDataParallel(model)) is model
