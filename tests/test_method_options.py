"""Every option of a method, one at a time and in pairs, is what the step written by hand makes of it."""

import copy

import pytest
import torch
from compared_rows import divergence_rows
from method_cases import (
    LARGE,
    WORDS,
    assert_same,
    check,
    example,
    mean_loss,
    objective_of,
    preset,
    run,
    site_of,
    tolerance,
    visible,
    written,
)
from step_oracle import At, Problem

from alum_kernels import AdversarialConfig, AdversarialObjective

MOVED = AdversarialConfig(**LARGE, normalize="linf", fused_head=False)
DIVERGENCES = ("symmetric_kl", "kl", "js", "squared_hellinger")


def test_published_sizes_have_the_divergence_and_its_gradient_alone():
    """At 1e-5 the divergence is 1e-10 of the loss: it is trained alone, and two passes differ in few digits."""
    for name in ("alum_finetuning", "smart", "r3f"):
        for family in ("bag", "bert"):
            expected = check(family, "classification", preset(name, clean_weight=0.0, alpha=1e6), rtol=1e-6)
            assert 1e-14 < expected.divergence < 1e-7


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
@pytest.mark.parametrize("normalize", ["none", "linf", "l2", "sign"])
@pytest.mark.parametrize("norm", ["linf", "l2", "linf_rescale", "none"])
def test_steps_norms_and_directions(norm, normalize, steps):
    for level in ("token", "sequence", "batch"):
        config = MOVED.replace(norm=norm, normalize=normalize, level=level, steps=steps)
        if norm == "linf_rescale" and steps > 1:
            config = config.replace(step_size=0.5)
        check("bag", "classification", config, rtol=1e-8)


UNITS = [
    (units, level, noise_level, normalize, norm)
    for units in ("absolute", "rms", "std")
    for level in ("token", "sequence", "batch")
    for noise_level in ("element", "group")
    for normalize, norm in (("linf", "linf"), ("l2", "l2"), ("sign", "l2"), ("l2", "linf"))
]


@pytest.mark.parametrize(("units", "level", "noise_level", "normalize", "norm"), UNITS)
def test_units(units, level, noise_level, normalize, norm):
    config = MOVED.replace(units=units, level=level, noise_level=noise_level, normalize=normalize, norm=norm, steps=2)
    check("bag", "classification", config, rtol=tolerance(config))


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("units", ["absolute", "rms"])
@pytest.mark.parametrize("normalize", ["l2", "linf", "sign"])
@pytest.mark.parametrize("noise_level", ["element", "group"])
def test_a_power_iteration(noise_level, normalize, units, steps):
    config = preset("vat", noise_level=noise_level, normalize=normalize, units=units, steps=steps)
    config = config.replace(std=0.3, step_size=0.2, epsilon=10.0)
    check("bag", "classification", config, rtol=max(tolerance(config), 2e-7))


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("gradient", ["full", "detach_targets", "detach_clean"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_and_their_conventions(divergence, gradient, task):
    for inner in DIVERGENCES:
        config = MOVED.replace(divergence=divergence, ascent_divergence=inner, gradient=gradient, temperature=2.0)
        check("bert", task, config)


@pytest.mark.parametrize("task", ["masked_lm", "causal_lm", "token_labels"])
def test_every_position_that_is_no_padding(task):
    family = "gpt2" if task == "causal_lm" else "bert"
    labelled = check(family, task, MOVED)
    everywhere = check(family, task, MOVED.replace(positions="all"))
    assert labelled.divergence != everywhere.divergence


@pytest.mark.parametrize(
    "method", ["alum_pretraining", "smart", "mtdnn", "vat", "freelb", "pgd", "r3f", "rdrop", "fgm"]
)
@pytest.mark.parametrize(("family", "task"), [("bert", "masked_lm"), ("gpt2", "causal_lm")])
def test_language_models_without_logits(family, task, method):
    config = visible(method).replace(fused_head=True)
    # the models' own loss is fp32 of a causal one, and exact here
    check(family, task, config, rtol=1e-8 if task == "masked_lm" else 1e-5)


@pytest.mark.parametrize("method", ["alum_finetuning", "freelb", "pgd", "sift"])
def test_excluded_tokens_stay(method):
    config = visible(method)
    excluded = check("bert", "classification", config.replace(excluded_tokens=(0, 2)), rtol=tolerance(config))
    ids = example("bert", "classification")[1]["input_ids"]
    for (delta,) in excluded.deltas:
        assert (delta[(ids == 0) | (ids == 2)] == 0).all()
    assert (ids == 2).any()


@pytest.mark.parametrize("method", ["alum_finetuning", "vat", "freelb", "freeat", "yopo", "fgm", "pgd", "neftune"])
def test_perturbed_passes_may_leave_the_embeddings_alone(method):
    expected = check("bert", "classification", visible(method).replace(detach_embeddings=True))
    words = expected.gradients[WORDS["bert"] + ".weight"]
    assert (words is None) == (method in ("freelb", "freeat", "yopo", "fgm", "pgd", "neftune"))


@pytest.mark.parametrize("site", ["embedding_norm", "embedding_norm_input"])
@pytest.mark.parametrize("family", ["bert", "bart"])
def test_sites(family, site):
    for method in ("alum_finetuning", "freelb", "pgd", "yopo"):
        check(family, "classification", visible(method).replace(site=site))


@pytest.mark.parametrize("method", ["alum_finetuning", "freelb", "pgd", "yopo", "vat"])
@pytest.mark.parametrize("side", ["decoder", "both"])
def test_sides_of_an_encoder_decoder(side, method):
    encoder, decoder = At("model.encoder.embed_tokens"), At("model.decoder.embed_tokens", decoder=True)
    sites = (decoder,) if side == "decoder" else (encoder, decoder)
    config, options = visible(method).replace(side=side), {}
    if config.inner_steps:
        options["first_layer"] = "model.decoder.layers.0"
        if side == "both":  # the decoder's first layer is the first one to see both
            config = config.replace(**options)
    check("bart", "seq2seq", config, rtol=1e-8, sites=sites, **options)


def test_a_first_layer_that_sees_one_side_alone_is_refused():
    model, batch = copy.deepcopy(example("bart", "seq2seq")[0]), example("bart", "seq2seq")[1]
    with pytest.raises(ValueError, match="does not depend on the perturbation"):
        run("bart", model, batch, preset("yopo", side="both"))


def test_two_modules_climb_together():
    words, types = WORDS["bert"], "bert.embeddings.token_type_embeddings"
    model, batch = example("bert", "classification")
    batch = {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}
    for method in ("smart", "freelb", "yopo"):
        config = visible(method).replace(modules=(words, types))
        expected = written("bert", copy.deepcopy(model), batch, "classification", config)
        assert_same(*run("bert", copy.deepcopy(model), batch, config), expected)
        assert not torch.equal(*expected.deltas[-1])


@pytest.mark.parametrize("units", ["absolute", "rms"])
@pytest.mark.parametrize("method", ["smart", "freelb", "freeat", "pgd", "fgm", "yopo", "vat", "neftune"])
def test_the_choices_of_a_sample_are_one_group(method, units):
    config = visible(method).replace(level="sample", units=units)
    config = config.replace(epsilon=config.epsilon / 10) if units == "rms" else config
    together = check("bert", "choice", config, rtol=max(tolerance(config), 1e-8))
    apart = check("bert", "choice", config.replace(level="sequence"), rtol=max(tolerance(config), 1e-8))
    assert not torch.equal(together.deltas[-1][0], apart.deltas[-1][0])


def test_a_sample_of_one_row_is_a_sequence():
    for method in ("smart", "freelb"):
        one, other = (check("bag", "classification", visible(method).replace(level=g)) for g in ("sample", "sequence"))
        assert torch.equal(one.deltas[-1][0], other.deltas[-1][0])


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("method", ["freelb", "freeat", "pgd", "yopo"])
def test_any_number_of_ascents(method, steps):
    check("bag", "classification", visible(method).replace(steps=steps))


@pytest.mark.parametrize("inner_steps", [1, 2, 5])
def test_any_number_of_inner_steps(inner_steps):
    for family in ("bag", "gpt2"):
        check(family, "classification", preset("yopo", inner_steps=inner_steps, epsilon=10.0))


def test_one_inner_step_is_an_ascent_of_freelb():
    """The first inner step goes along the whole gradient: p . df_0/d delta is the chain rule."""
    whole = check("bert", "classification", preset("freelb", steps=1))
    inner = check("bert", "classification", preset("yopo", steps=1, inner_steps=1))
    torch.testing.assert_close(inner.deltas[-1][0], whole.deltas[-1][0], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_distributions(distribution):
    for method in ("smart", "r3f", "freelb", "neftune"):
        check("bag", "classification", visible(method).replace(distribution=distribution))


def test_the_other_ball_of_smart():
    config = AdversarialConfig.smart(norm="l2", **LARGE, fused_head=False)
    assert (config.norm, config.normalize) == ("l2", "l2")
    for family in ("bag", "bert"):
        check(family, "classification", config)


def test_a_sentence_of_mtdnn():
    check("bert", "classification", visible("mtdnn").replace(level="sequence"))


@pytest.mark.parametrize("method", ["smart", "freelb", "pgd", "freeat", "yopo", "rdrop", "neftune"])
def test_a_first_perturbation_that_is_given(method):
    model, batch = example("bag", "classification")
    generator = torch.Generator().manual_seed(3)
    delta = 0.05 * torch.randn((*batch["input_ids"].shape, 12), generator=generator, dtype=torch.float64)
    config = visible(method)
    expected = written("bag", copy.deepcopy(model), batch, "classification", config, initial=[delta.clone()])
    before = delta.clone()
    assert_same(*run("bag", copy.deepcopy(model), batch, config, delta=[delta]), expected)
    assert torch.equal(delta, before)
    with pytest.raises(ValueError, match=r"^delta: expected one tensor for each of 1 sites, got 2"):
        run("bag", copy.deepcopy(model), batch, config, delta=[delta, delta])
    with pytest.raises(ValueError, match=r"^delta: expected shape \(3, 5, 12\), got \(3, 5, 11\)"):
        run("bag", copy.deepcopy(model), batch, config, delta=[delta[..., :-1]])


WEIGHTS = [(0.0, 1.0, 0.0), (0.5, 2.0, 0.0), (0.5, 0.0, 0.25), (0.0, 3.0, 0.5), (1.0, 0.5, 2.0)]


@pytest.mark.parametrize(("clean_weight", "alpha", "adversarial_weight"), WEIGHTS)
@pytest.mark.parametrize("ascent", ["divergence", "task"])
def test_weights_of_the_three_terms(ascent, clean_weight, alpha, adversarial_weight):
    config = MOVED.replace(
        clean_weight=clean_weight, alpha=alpha, adversarial_weight=adversarial_weight, ascent=ascent, steps=2
    )
    for family in ("bag", "gpt2"):
        check(family, "classification", config)


@pytest.mark.parametrize("task", ["classification", "regression", "masked_lm"])
def test_a_proximal_term(task):
    original, batch = example("bert", task)
    torch.manual_seed(4)
    for method in ("smart", "pgd", "r3f"):
        config = visible(method).replace(proximal=2.0, clean_weight=1.0)
        model, teacher = copy.deepcopy(original), copy.deepcopy(original)
        objective = AdversarialObjective(model, config)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        objective.follow(optimizer)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        expected = written("bert", copy.deepcopy(model), batch, task, config, teacher=teacher)
        output = objective.forward(batch, seed=torch.tensor([977]), sample_offset=3)
        output.loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert_same(output, gradients, expected)
        assert expected.proximal > 1e-4


def test_a_loss_of_the_callers():
    config = visible("smart")
    model, batch = example("bag", "classification")
    logits = model(batch["input_ids"], batch["attention_mask"])
    assert torch.equal(mean_loss(logits, batch), check("bag", "classification", config).task_loss)


@pytest.mark.parametrize("method", ["smart", "vat", "pgd", "freelb", "freeat", "yopo"])
def test_the_telemetry_compares_the_first_point_with_the_last(method):
    config = visible(method).replace(steps=3)
    model, batch = copy.deepcopy(example("bag", "classification"))
    objective, seed = objective_of("bag", model, config), torch.tensor([977])
    expected = written("bag", copy.deepcopy(model), batch, "classification", config)
    problem = Problem(copy.deepcopy(model), batch, "classification", site_of("bag", config), mean_loss)
    options = {"update": lambda: None} if method == "freeat" else {}
    objective.forward(batch, seed=seed, sample_offset=3, backward=torch.Tensor.backward, **options)
    figures = objective.telemetry.read()
    if method == "freeat":  # the oracle's replays update the model
        expected = written("bag", copy.deepcopy(model), batch, "classification", config, learning_rate=0.0)
    with torch.no_grad():
        clean, first, last = (problem.run(deltas) for deltas in (None, expected.deltas[0], expected.deltas[-1]))
    if config.ascent == "task":
        increase = mean_loss(last, batch) - mean_loss(first, batch)
        assert figures["task_increase"] == pytest.approx(increase.item(), rel=1e-4)
        assert "ascent_gain" not in figures
    else:
        at_last, at_first = (divergence_rows(logits, clean, config.divergence).sum().item() for logits in (last, first))
        assert figures["ascent_gain"] == pytest.approx(at_last / at_first, rel=1e-4)
