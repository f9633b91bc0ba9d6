"""What holds for every method whatever the numbers: padding, the ball, no adversary, dropout."""

import copy

import pytest
import tiny_models
import torch
from method_cases import NORMS, WORDS, example, mean_loss, objective_of, preset, site_of, visible, without_adversary
from tiny_models import Gradients
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.adversarial.config import PRESETS

DIVERGENCE = [name for name in PRESETS if getattr(AdversarialConfig, name)().alpha > 0]
LABELLED = [name for name in PRESETS if name not in (*DIVERGENCE, "llr")]
ON_THE_WAY = [name for name in PRESETS if getattr(AdversarialConfig, name)().backward != "final"]


def moves(family: str, config: AdversarialConfig) -> tuple[list[Tensor], Tensor]:
    """delta of every pass of a step that runs to the model's end, and (B, S) the tokens that are no padding."""
    original, batch = example(family, "choice" if config.level == "sample" else "classification")
    model = copy.deepcopy(original)
    (site,) = site_of(family, config)
    objective, seen = objective_of(family, model, config), []
    module = model.get_submodule(site.name)
    # after the objective's own hook, so that what the rest of the model receives is seen
    if site.on_input:
        module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    else:
        module.register_forward_hook(lambda m, args, output: seen.append(output.detach()))
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        model(**inputs)
    options = {"update": lambda: None} if config.backward == "replay" else {}
    objective.forward(batch, backward=Tensor.backward, **options)
    clean, *passes = seen
    return [tensor - clean for tensor in passes], batch["attention_mask"].flatten(0, -2) == 1


def clean_embeddings(family: str) -> Tensor:
    model, batch = example(family, "classification")
    return model.get_submodule(WORDS[family])(batch["input_ids"]).detach()


def lengths(delta: Tensor, norm: str, level: str, choices: int = 3) -> Tensor:
    """Norm of every group."""
    groups = {
        "token": lambda: delta.flatten(0, 1),
        "sequence": lambda: delta.flatten(1),
        "sample": lambda: delta.reshape(-1, choices * delta[0].numel()),
        "batch": lambda: delta.reshape(1, -1),
    }[level]()
    return groups.norm(dim=-1) if norm == "l2" else groups.abs().amax(-1)


CASES = {name: visible(name) for name in PRESETS}
CASES |= {f"{name}-tight": visible(name).replace(epsilon=1e-3) for name in ("freelb", "pgd", "fgm", "freeat", "yopo")}
CASES |= {f"smart-{level}": visible("smart").replace(norm="l2", level=level) for level in ("token", "batch", "sample")}
CASES["mtdnn-sentence"] = visible("mtdnn").replace(level="sequence")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["bag", "bert", "bart"])
def test_padding_stays_and_the_perturbation_stays_in_its_ball(family, case):
    config = CASES[case]
    if (config.level == "sample" and family != "bert") or (config.site != "embeddings" and family not in NORMS):
        pytest.skip(f"{family} has no {config.level}s of several rows, or no layer norm of its embeddings")
    if config.ascent == "linearity" and family == "bag":
        pytest.skip("has no loss of its own")
    deltas, valid = moves(family, config)
    for delta in deltas:
        assert (delta[~valid] == 0).all()
    last = deltas[-1]
    if config.std == 0 and config.steps == 0:
        assert (last == 0).all()
        return
    assert (last[valid] != 0).any(-1).all()
    ball = {"linf": config.epsilon, "l2": config.epsilon, "linf_rescale": 1.0, "none": None}[config.norm]
    if config.units == "rms":
        embeds = clean_embeddings(family) * valid.unsqueeze(-1)
        rms = (embeds.square().sum((1, 2)) / (valid.sum(1) * embeds.shape[2])).sqrt()
        last = last / rms.view(-1, 1, 1)
    if ball is not None:
        size = lengths(last, config.norm, config.level)
        assert size.max() <= ball * (1 + 1e-6)
        if "tight" in case or config.norm == "linf_rescale":
            # the projection was needed
            assert size.max() >= ball * (1 - 1e-3)


def test_the_ball_of_relative_units_is_a_share_of_the_norm():
    for name in ("freelb", "pgd", "yopo"):
        config = visible(name).replace(units="rms", epsilon=0.01)
        deltas, valid = moves("bert", config)
        embeds = clean_embeddings("bert") * valid.unsqueeze(-1)
        share = deltas[-1].flatten(1).norm(dim=1) / embeds.flatten(1).norm(dim=1)
        torch.testing.assert_close(share, torch.full_like(share, 0.01), rtol=1e-5, atol=0)
    noise = moves("bert", preset("neftune", units="rms", std=0.02))[0][-1]
    share = noise.flatten(1).norm(dim=1) / embeds.flatten(1).norm(dim=1)
    # of U(-1, 1) the root mean square is 1/sqrt(3)
    torch.testing.assert_close(share, torch.full_like(share, 0.02 / 3**0.5), rtol=0.25, atol=0)


def dropout_model(family: str) -> nn.Module:
    return tiny_models.make(family, "classification", dropout=0.3)


def standard(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of an ordinary step, and the state of dropout's generator after it."""
    torch.manual_seed(11)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), Gradients.of(model).flat(), torch.get_rng_state()


def counted(model: nn.Module) -> list[int]:
    calls = [0]
    model.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return calls


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ON_THE_WAY])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_without_weights_training_is_the_standard_one_bit_for_bit(family, name):
    config = without_adversary(name)
    if config.site != "embeddings" and family != "bert":
        pytest.skip("no layer norm of its embeddings")
    model, batch = dropout_model(family), tiny_models.classification_batch()
    expected = standard(model, batch)
    objective, calls = AdversarialObjective(model, config), counted(model)
    torch.manual_seed(11)
    model.zero_grad()
    objective.backward(batch)
    assert torch.equal(Gradients.of(model).flat(), expected[1])
    assert torch.equal(torch.get_rng_state(), expected[2])
    assert calls == [1]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("start", [2, 0.5])
def test_before_its_start_a_method_is_the_standard_one_bit_for_bit(name, start):
    model, batch = dropout_model("bert"), tiny_models.classification_batch()
    loss, grads, state = standard(model, batch)
    config = preset(name, start=start)
    objective, calls = AdversarialObjective(model, config), counted(model)
    update = {"update": model.zero_grad} if config.backward == "replay" else {}
    for done in range(2):
        objective.set_progress(done, 4)
        torch.manual_seed(11)
        model.zero_grad()
        figures = objective.backward(batch, **update)
        assert torch.equal(figures["loss"], loss)
        assert torch.equal(figures["task_loss"], loss)
        assert torch.equal(Gradients.of(model).flat(), grads)
        assert torch.equal(torch.get_rng_state(), state)
        assert calls == [done + 1]
    objective.set_progress(2, 4)
    torch.manual_seed(11)
    model.zero_grad()
    figures = objective.backward(batch, **update)
    assert not torch.equal(Gradients.of(model).flat(), grads)
    assert calls[0] > 3 or config.method == "neftune"


@pytest.mark.parametrize("clean_weight", [1.0, 0.0])
def test_before_its_start_a_teacher_is_followed_and_nothing_is_perturbed(clean_weight):
    model, batch = dropout_model("bert"), tiny_models.classification_batch()
    loss, grads, _ = standard(model, batch)
    config = preset("pgd", start=5, proximal=1.0, clean_weight=clean_weight)
    objective, calls = AdversarialObjective(model, config), counted(model)
    objective.follow(torch.optim.SGD(model.parameters(), lr=0.1))
    torch.manual_seed(11)
    model.zero_grad()
    output = objective(**batch)
    output.loss.backward()
    assert output.proximal == 0
    assert output.adversarial_loss is None
    # the teacher is the model, so that its term has no gradient
    torch.testing.assert_close(output.loss.detach(), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(Gradients.of(model).flat(), grads, rtol=1e-5, atol=1e-7)
    assert calls == [2]


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart", "t5"])
@pytest.mark.parametrize("name", DIVERGENCE)
def test_with_shared_dropout_two_passes_without_a_perturbation_agree_exactly(name, family):
    still = {"std": 0.0, "step_size": 0.0, "dropout": "shared"}
    if name == "sift" and family in ("gpt2", "t5"):
        pytest.skip("no layer norm of its embeddings")
    if name == "mtdnn":
        still["norm"] = "none"  # a rescaling makes any step one of length 1
    model, batch = dropout_model(family), tiny_models.classification_batch()
    output = AdversarialObjective(model, preset(name, **still))(**batch)
    assert output.divergence == 0
    apart = AdversarialObjective(model, preset(name, **still | {"dropout": "independent"}))(**batch)
    assert apart.divergence > 1e-3


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart", "t5"])
def test_rdrop_compares_two_draws_of_dropout(family):
    model, batch = dropout_model(family), tiny_models.classification_batch()
    output = AdversarialObjective(model, preset("rdrop"))(**batch)
    assert output.divergence > 1e-3
    assert output.adversarial_loss != output.task_loss
    whole = output.task_loss + output.adversarial_loss + 0.5 * output.divergence
    torch.testing.assert_close(output.loss.detach(), whole)
    model.eval()
    assert AdversarialObjective(model, preset("rdrop"))(**batch).divergence == 0


@pytest.mark.parametrize("name", LABELLED)
def test_with_shared_dropout_a_still_perturbation_leaves_the_loss(name):
    """The passes of these methods are all the standard one."""
    model, batch = dropout_model("bert"), tiny_models.classification_batch()
    loss, grads, _ = standard(model, batch)
    objective = AdversarialObjective(model, preset(name, std=0.0, step_size=0.0, dropout="shared"))
    update = {"update": model.zero_grad} if name == "freeat" else {}
    torch.manual_seed(11)
    model.zero_grad()
    figures = objective.backward(batch, **update)
    weight = 2.0 if name == "fgm" else 1.0
    torch.testing.assert_close(figures["task_loss"], loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(figures["loss"], weight * loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(Gradients.of(model).flat(), weight * grads, rtol=1e-5, atol=1e-7)


def test_a_loss_of_the_callers_before_the_start():
    model, batch = copy.deepcopy(example("bag", "classification"))
    objective = objective_of("bag", model, visible("smart").replace(start=1))
    first, second = objective(**batch), objective(**batch)
    assert torch.equal(first.loss, mean_loss(model(batch["input_ids"], batch["attention_mask"]), batch))
    assert first.divergence == 0
    assert second.divergence > 0


def test_the_clean_weight_stays_while_a_schedule_keeps_the_adversary_away():
    model, batch = copy.deepcopy(example("bag", "classification"))
    config = visible("smart").replace(clean_weight=0.5, alpha_schedule=((0.0, 0.0), (1.0, 1.0)))
    objective, losses = objective_of("bag", model, config), []
    for done in (0, 1):
        objective.set_progress(done, 10**12)
        losses.append(objective.forward(batch, seed=torch.tensor([3])).loss)
    plain = mean_loss(model(batch["input_ids"], batch["attention_mask"]), batch)
    assert torch.equal(losses[0], 0.5 * plain)
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)
