"""The loss of each sample against the model's own loss of a batch of that sample alone."""

import pytest
import tiny_models
import torch

from alum_kernels.adversarial.heads import detect_head
from alum_kernels.adversarial.sample_losses import SampleLosses

EVERY = [
    ("bert", "classification"),
    ("bert", "regression"),
    ("bert", "choice"),
    ("bert", "token_labels"),
    ("bert", "spans"),
    ("bert", "masked_lm"),
    ("gpt2", "causal_lm"),
    ("t5", "seq2seq"),
]


def predictions(model, head, batch) -> list[torch.Tensor]:
    outputs = model(**head.inputs(batch, model))
    return [part.predictions(outputs, batch) for part in head.parts]


@pytest.mark.parametrize(("family", "task"), EVERY, ids=["-".join(pair) for pair in EVERY])
def test_a_sample_loses_what_the_model_says_of_it_alone(family, task):
    model, batch = tiny_models.make(family, task), tiny_models.batch(task)
    if task == "spans":  # a model's own loss lets an answer be on padding
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        batch["start_positions"][2], batch["end_positions"][2] = 1, 3
    head = detect_head(model)
    losses = SampleLosses(head, batch)(predictions(model, head, batch))
    for index, loss in enumerate(losses):
        alone = model(**{name: x[index : index + 1] for name, x in batch.items()}).loss
        torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_pretraining_adds_its_heads():
    model, batch = tiny_models.bert_pretraining(), tiny_models.pretraining_batch()
    head = detect_head(model)
    losses = SampleLosses(head, batch)(predictions(model, head, batch))
    for index, loss in enumerate(losses):
        alone = model(**{name: x[index : index + 1] for name, x in batch.items()}).loss
        torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-6)


def test_the_mean_of_a_classifier_is_its_own_loss_and_ignored_samples_do_not_count():
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    batch["labels"][1] = -100
    head = detect_head(model)
    samples = SampleLosses(head, batch)
    losses = samples(predictions(model, head, batch))
    assert losses[1] == 0
    torch.testing.assert_close(samples.mean(losses), model(**batch).loss)
    assert samples.mean(torch.tensor([1.0, torch.nan, 2.0, 6.0])) == 3
    batch["labels"][:] = -100
    assert SampleLosses(head, batch).mean(losses) == 0


def test_samples_count_as_often_as_they_have_a_labelled_position():
    batch = tiny_models.masked_lm_batch()
    batch["labels"][2] = -100
    model = tiny_models.bert_masked_lm()
    head = detect_head(model)
    samples = SampleLosses(head, batch)
    losses = samples(predictions(model, head, batch))
    assert losses[2] == 0
    counts = (batch["labels"] != -100).sum(1)
    assert len(set(counts.tolist())) == 3
    torch.testing.assert_close(samples.mean(losses), (losses * counts).sum() / counts.sum())
    torch.testing.assert_close(samples.mean(losses), model(**batch).loss)


def test_padding_takes_no_part_in_an_answer_and_its_second_derivatives_are_finite():
    model, batch = tiny_models.make("bert", "spans"), tiny_models.batch("spans")
    head = detect_head(model)
    hidden = torch.randn(*batch["input_ids"].shape, 2, requires_grad=True)
    mask = batch["attention_mask"] == 0
    logits = [part.masked_fill(mask, -torch.inf) for part in hidden.unbind(-1)]
    losses = SampleLosses(head, batch)(logits)
    kept = [torch.log_softmax(torch.where(mask, -1e9, part), -1) for part in hidden.unbind(-1)]
    expected = (
        -(
            kept[0].gather(1, batch["start_positions"][:, None] % 7)
            + kept[1].gather(1, batch["end_positions"][:, None] % 7)
        )[:, 0]
        / 2
    )
    expected[2] = 0  # its answer lies outside
    torch.testing.assert_close(losses, expected)
    (grad,) = torch.autograd.grad(losses.sum(), hidden, create_graph=True)
    (second,) = torch.autograd.grad((grad**2).sum(), hidden)
    assert second.isfinite().all()
    assert second.any()


def test_labels_that_do_not_fit_are_named():
    batch = tiny_models.classification_batch()
    head = detect_head(tiny_models.bert())
    with pytest.raises(ValueError, match=r"^labels: expected shape \(5,\) as the logits, got \(4,\)"):
        SampleLosses(head, batch)([torch.zeros(5, 3)])
    regression = detect_head(tiny_models.bert(labels=1))
    with pytest.raises(ValueError, match=r"^batch: expected 'labels' \(B,\) for a regression head, got input_ids"):
        SampleLosses(regression, tiny_models.tokens())
    with pytest.raises(ValueError, match=r"^labels: expected shape \(4, 2\) as the logits, got \(4,\)"):
        SampleLosses(regression, tiny_models.regression_batch())([torch.zeros(4, 2)])
