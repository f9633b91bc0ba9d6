"""Which tensors of a model are perturbed, and which of their positions."""

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.adversarial.sites import Site, choices_of, perturbed_sites

ENCODER, DECODER = Site("encoder", nn.Identity()), Site("decoder", nn.Identity(), decoder=True)
EMBEDS, MASK = torch.zeros(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])


def test_every_kind_of_mask_and_none():
    for given in (MASK, MASK.bool(), MASK.float(), MASK.to(torch.uint8)):
        assert torch.equal(ENCODER.valid_positions({"attention_mask": given}, EMBEDS) != 0, MASK != 0)
    assert ENCODER.valid_positions({"input_ids": MASK}, EMBEDS) is None
    assert ENCODER.valid_positions({"attention_mask": None}, EMBEDS) is None
    with pytest.raises(ValueError, match=r"^attention_mask: expected shape \(2, 3\) .* got \(2, 4\)"):
        ENCODER.valid_positions({"attention_mask": torch.ones(2, 4)}, EMBEDS)


def test_a_mask_of_pairs_keeps_what_attends_to_itself():
    pairs = torch.tril(torch.ones(3, 3, dtype=torch.bool)) & (MASK != 0)[:, None, None, :]
    lowest = torch.finfo(torch.float32).min
    for given in (pairs, torch.where(pairs, 0.0, lowest), torch.where(pairs, 0.0, -torch.inf), pairs.long()):
        assert torch.equal(ENCODER.valid_positions({"attention_mask": given}, EMBEDS), MASK != 0)


def test_a_mask_for_each_kind_of_layer_counts_by_its_first():
    pairs = torch.tril(torch.ones(3, 3, dtype=torch.bool)) & (MASK != 0)[:, None, None, :]
    batch = {"input_ids": MASK, "attention_mask": {"full_attention": pairs, "sliding_attention": pairs}}
    assert torch.equal(ENCODER.valid_positions(batch, EMBEDS), MASK != 0)


def test_choices_are_rows():
    batch = {"input_ids": torch.zeros(1, 2, 3, dtype=torch.long), "attention_mask": MASK[None]}
    assert choices_of(batch) == 2
    assert torch.equal(ENCODER.valid_positions(batch, EMBEDS), MASK)
    assert choices_of({"input_ids": torch.zeros(2, 3)}) == choices_of({}) == 1


def test_a_decoder_has_its_own_mask_also_where_lengths_agree():
    encoder = torch.ones(2, 3, dtype=torch.long)
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    both = {"attention_mask": encoder, "decoder_attention_mask": MASK, "labels": labels}
    assert DECODER.valid_positions(both, EMBEDS) is MASK
    assert ENCODER.valid_positions(both, EMBEDS) is encoder
    assert torch.equal(DECODER.valid_positions({"attention_mask": encoder, "labels": labels}, EMBEDS), labels != -100)
    given = {"attention_mask": encoder, "decoder_input_ids": encoder, "labels": torch.zeros(2)}
    assert DECODER.valid_positions(given, EMBEDS) is None
    # a classifier's decoder reads the encoder's tokens
    assert DECODER.valid_positions({"attention_mask": encoder, "labels": torch.zeros(2)}, EMBEDS) is encoder


def test_tokens_are_excluded_by_their_ids():
    ids = torch.tensor([[0, 7, 2], [0, 2, 1]])
    batch = {"input_ids": ids, "attention_mask": MASK}
    assert ENCODER.valid_positions(batch, EMBEDS, torch.tensor((0, 2))).tolist() == [
        [False, True, False],
        [False, False, False],
    ]
    without_mask = ENCODER.valid_positions({"input_ids": ids.int()}, EMBEDS, torch.tensor((0, 2)))
    assert without_mask.tolist() == [[False, True, False], [False, False, True]]
    with pytest.raises(ValueError, match=r"^excluded_tokens: expected token ids \(2, 3\) for encoder, got none"):
        ENCODER.valid_positions({"attention_mask": MASK}, EMBEDS, torch.tensor((0,)))


def test_excluded_tokens_are_copied_to_the_device_once(monkeypatch):
    batch = tiny_models.classification_batch()
    objective = AdversarialObjective(tiny_models.bert(), AdversarialConfig(excluded_tokens=(2,)))
    objective(**batch)
    monkeypatch.setattr(torch, "tensor", lambda *args, **kwargs: pytest.fail("a step copies from the host"))
    objective(**batch)


def test_names_choose_modules_and_wrong_ones_are_named():
    model = tiny_models.bert()
    (chosen,) = perturbed_sites(model, ("bert.embeddings.token_type_embeddings",))
    assert chosen.module is model.bert.embeddings.token_type_embeddings
    (found,) = perturbed_sites(model)
    assert (found.name, found.module) == ("bert.embeddings.word_embeddings", model.bert.embeddings.word_embeddings)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification has no module named 'bert\.words'"):
        perturbed_sites(model, ("bert.words",))
    with pytest.raises(ValueError, match="Linear has no input embeddings to perturb"):
        perturbed_sites(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_sides_of_an_encoder_decoder(name):
    model = tiny_models.CLASSIFIERS[name]()
    both = perturbed_sites(model, side="both")
    assert [site.module for site in both] == [model.get_encoder().embed_tokens, model.get_decoder().embed_tokens]
    assert [site.decoder for site in both] == [False, True]
    assert perturbed_sites(model, side="decoder") == both[1:]
    assert perturbed_sites(model, tuple(site.name for site in both)) == both
    with pytest.raises(ValueError, match=r"^side: expected 'encoder' for BertForSequenceClassification"):
        perturbed_sites(tiny_models.bert(), side="both")


def test_the_layer_norm_of_the_embeddings():
    for make in (tiny_models.bert, tiny_models.roberta):
        model = make()
        (site,) = perturbed_sites(model, site="embedding_norm")
        assert (site.module, site.on_input) == (model.base_model.embeddings.LayerNorm, False)
    sites = perturbed_sites(tiny_models.bart(), site="embedding_norm", side="both")
    assert [site.name for site in sites] == ["model.encoder.layernorm_embedding", "model.decoder.layernorm_embedding"]
    assert perturbed_sites(tiny_models.bert(), site="embedding_norm_input")[0].on_input
    with pytest.raises(ValueError, match="GPT2ForSequenceClassification has no layer norm of its embeddings"):
        perturbed_sites(tiny_models.gpt2(), site="embedding_norm")


def seen_at(module: nn.Module, objective: AdversarialObjective, batch: dict, on_input: bool) -> list[Tensor]:
    """What a module gets (or gives) in each pass of a step."""
    seen = []
    handle = (
        module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
        if on_input
        else module.register_forward_hook(lambda m, args, output: seen.append(output.detach()))
    )
    objective(**batch)
    handle.remove()
    return seen


@pytest.mark.parametrize("site", ["embedding_norm", "embedding_norm_input"])
def test_the_perturbation_is_where_the_site_says(site):
    model, batch = tiny_models.bert().double(), tiny_models.classification_batch()
    config = AdversarialConfig(std=1e-2, step_size=2e-2, epsilon=2e-2, normalize="linf", site=site)
    objective = AdversarialObjective(model, config)
    norm, words = model.bert.embeddings.LayerNorm, model.bert.embeddings.word_embeddings
    clean, _, final = seen_at(norm, objective, batch, on_input=site.endswith("input"))
    delta = final - clean
    valid = batch["attention_mask"] == 1
    assert (delta[~valid] == 0).all()
    assert (delta[valid].abs().amax(-1) > 1e-3).all()
    assert delta.abs().max() <= 2e-2 * (1 + 1e-6)
    before, *_, after = seen_at(words, objective, batch, on_input=False)
    assert torch.equal(before, after)
