"""Local smoothness: the divergences at a random point and along an ascent, written out by hand in float64."""

import math

import pytest
import tiny_models
import torch
from linear_classifier import cut
from tiny_models import BagOfEmbeddings

from alum_kernels.backends.reference import noise_init as reference_noise
from alum_kernels.evaluation import local_smoothness

OPTIONS = {"modules": ("embed",), "head": "classification"}


def close(actual, expected, rtol, atol=0.0):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def symmetric_kl(adv_logits, logits):
    """(B,) sum of (p - q) (log p - log q): in float64, far from p = q, this form is good to many digits."""
    log_p, log_q = adv_logits.log_softmax(-1), logits.log_softmax(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def unit_draw(shape, mask, draw, distribution, seed):
    noise = {"std": 1.0, "mask": mask, "distribution": distribution, "stream": draw, "sample_offset": 0}
    return reference_noise.initial_delta(shape, torch.tensor([seed]), torch.float64, **noise)


def group_norm(x, level):
    return x.norm(dim=2, keepdim=True) if level == "token" else x.flatten(1).norm(dim=1)[:, None, None]


def by_hand(divergence, clean, mask, epsilon, *, steps, draws, seed, norm, level):
    """(B,) divergence at the random point, mean over the draws, and the largest along the ascents.

    ``divergence`` is of (B, S, H) embeddings, to (B,); ``clean`` are those of the batch.
    """
    kept = mask.unsqueeze(-1).double()
    random, largest = torch.zeros(len(mask), dtype=torch.float64), torch.zeros(len(mask), dtype=torch.float64)
    for draw in range(draws):
        if norm == "linf":
            delta = epsilon * unit_draw(clean.shape, mask, draw, "uniform", seed)
        else:
            direction = unit_draw(clean.shape, mask, draw, "normal", seed)
            delta = epsilon * direction / group_norm(direction, level).clamp(min=1e-300)
        for step in range(steps + 1):
            point = (clean + delta).requires_grad_()
            values = divergence(point)
            random += values.detach() / draws if step == 0 else 0
            largest = torch.maximum(largest, values.detach())
            (grad,) = torch.autograd.grad(values.sum(), point)
            grad, length = grad * kept, 2 * epsilon * (1 - step / steps) if steps else 0.0
            if norm == "linf":
                delta = (delta + length * grad.sign()).clamp(-epsilon, epsilon)
            else:
                delta = delta + length * grad / group_norm(grad, level).clamp(min=1e-300)
                delta = delta * (epsilon / group_norm(delta, level).clamp(min=1e-300)).clamp(max=1)
    return random, largest


@pytest.mark.parametrize(("norm", "level"), [("l2", "sequence"), ("l2", "token"), ("linf", "token")])
@pytest.mark.parametrize(("steps", "draws"), [(0, 1), (4, 2)])
def test_the_divergences_are_those_written_by_hand(norm, level, steps, draws):
    model, batch = BagOfEmbeddings().double(), tiny_models.classification_batch(7)
    given = {"steps": steps, "draws": draws, "seed": 11, "norm": norm, "level": level}
    report = local_smoothness(model, [batch], epsilon=0.4, **given, **OPTIONS)
    clean, mask = model.embed(batch["input_ids"]).detach(), batch["attention_mask"]
    logits = model.body(clean, mask).detach()
    random, ascended = by_hand(lambda x: symmetric_kl(model.body(x, mask), logits), clean, mask, 0.4, **given)
    close(report.random, random, rtol=1e-8)
    close(report.ascended, ascended, rtol=1e-8)
    assert (report.ascended >= report.random).all()
    assert report.ratio == pytest.approx((ascended.mean() / random.mean()).item())
    assert report.median_ratio == pytest.approx((ascended / random).quantile(0.5).item())
    assert report.random_median == pytest.approx(random.quantile(0.5).item())
    assert report.ascended_mean == pytest.approx(ascended.mean().item())


def test_an_ascent_moves_predictions_more_than_chance():
    report = local_smoothness(tiny_models.bert(), [tiny_models.classification_batch(8)], epsilon=0.5)
    assert report.ratio > 3
    assert report.median_ratio > 3


def test_labels_play_no_part_and_cuts_change_nothing():
    model, batch = BagOfEmbeddings().double(), tiny_models.classification_batch(8)
    whole = local_smoothness(model, [batch], epsilon=0.3, **OPTIONS)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    pieces = local_smoothness(model, cut(inputs, 1, 4, 3), epsilon=0.3, **OPTIONS)
    close(pieces.random, whole.random, rtol=1e-9)
    close(pieces.ascended, whole.ascended, rtol=1e-6)
    other = local_smoothness(model, [batch], epsilon=0.3, seed=1, **OPTIONS)
    assert (other.random != whole.random).all()


def test_small_perturbations_keep_their_digits():
    """At 1e-6 of fp32 the divergence is 1e-12 and smaller: quadratic in the radius, which two KLs would not show."""
    model, batch = BagOfEmbeddings(), tiny_models.classification_batch(8)
    small, large = (local_smoothness(model, [batch], epsilon=e, steps=0, **OPTIONS) for e in (1e-3, 1e-2))
    close(large.random / small.random, torch.full((8,), 100.0, dtype=torch.float64), rtol=0.02)


def test_a_language_model_is_compared_at_labelled_positions_or_at_all():
    model, batch = tiny_models.bert_masked_lm(), tiny_models.masked_lm_batch(4)
    batch["labels"][1] = -100
    labelled = local_smoothness(model, [batch], epsilon=0.1, steps=2)
    everywhere = local_smoothness(model, [batch], epsilon=0.1, steps=2, positions="all")
    assert labelled.counted.tolist() == [True, False, True, True]
    assert everywhere.counted.all()
    assert labelled.random[1] == 0
    assert (labelled.random != everywhere.random)[[0, 2, 3]].all()
    assert labelled.random_mean == pytest.approx(labelled.random[[0, 2, 3]].mean().item())
    model.eval()
    embeds = model.bert.embeddings.word_embeddings(batch["input_ids"])
    direction = unit_draw(embeds.shape, batch["attention_mask"], 0, "normal", 0)
    point = embeds + (0.1 * direction / group_norm(direction, "sequence")).float()
    with torch.no_grad():
        moved = model(inputs_embeds=point, attention_mask=batch["attention_mask"]).logits.double()
        clean = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits.double()
    rows, kept = symmetric_kl(moved, clean), batch["labels"] != -100
    expected = (rows * kept).sum(1) / kept.sum(1).clamp(min=1)
    close(labelled.random, expected, rtol=1e-3)


def test_both_heads_of_pretraining_are_added():
    model, batch = tiny_models.bert_pretraining().double(), tiny_models.pretraining_batch(3)
    given = {"steps": 3, "draws": 2, "seed": 7, "norm": "l2", "level": "sequence"}
    report = local_smoothness(model, [batch], epsilon=0.1, **given)
    assert report.counted.all()
    model.eval()
    mask, kept = batch["attention_mask"], (batch["labels"] != -100).double()
    clean = model.bert.embeddings.word_embeddings(batch["input_ids"]).detach()

    def predictions(embeds):
        outputs = model(inputs_embeds=embeds, attention_mask=mask)
        return outputs.prediction_logits, outputs.seq_relationship_logits

    at_clean = [logits.detach() for logits in predictions(clean)]

    def divergence(embeds):
        words, next_sentence = (symmetric_kl(*pair) for pair in zip(predictions(embeds), at_clean, strict=True))
        return (words * kept).sum(1) / kept.sum(1) + next_sentence

    random, ascended = by_hand(divergence, clean, mask, 0.1, **given)
    close(report.random, random, rtol=1e-8)
    close(report.ascended, ascended, rtol=1e-7)


def test_nothing_moved_has_no_ratio():
    report = local_smoothness(BagOfEmbeddings(), [tiny_models.classification_batch(3)], epsilon=0.0, **OPTIONS)
    assert report.random_mean == report.ascended_mean == 0
    assert math.isnan(report.ratio)
    assert math.isnan(report.median_ratio)


def test_half_precision_still_climbs():
    model, batch = BagOfEmbeddings(), tiny_models.classification_batch(6)
    single = local_smoothness(model, [batch], epsilon=0.05, **OPTIONS)
    half = local_smoothness(model.half(), [batch], epsilon=0.05, **OPTIONS)
    close(torch.tensor(half.ascended_mean), torch.tensor(single.ascended_mean), rtol=0.2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"draws": 0}, ValueError, "^draws: expected a number >= 1, got 0"),
        ({"draws": 1.0}, TypeError, "^draws: expected an int, got float"),
        ({"positions": "some"}, ValueError, "^positions: expected one of 'labelled', 'all'"),
        ({"level": "batch"}, ValueError, "^level: expected one of 'token', 'sequence'"),
        ({"steps": -1}, ValueError, "^steps: expected a number >= 0, got -1"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        local_smoothness(BagOfEmbeddings(), [tiny_models.classification_batch(3)], epsilon=0.1, **OPTIONS, **options)


def test_nothing_to_compare_is_named():
    batch = tiny_models.masked_lm_batch(3)
    unlabelled = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(ValueError, match=r"^batches: expected at least one row to compare"):
        local_smoothness(tiny_models.bert_masked_lm(), [unlabelled], epsilon=0.1)
