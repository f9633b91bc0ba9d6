"""Robustness figures of every head: what counts as a row, whose sample it is, and what it loses."""

import pytest
import tiny_models
import torch
import transformers
from tiny_models import LABELS, PADDING, VOCABULARY
from torch import nn
from torch.nn import functional

from alum_kernels.adversarial.heads import Head
from alum_kernels.evaluation import (
    accuracy_under_attack,
    largest_loss_increase,
    local_smoothness,
    smallest_flipping_radius,
)
from alum_kernels.evaluation.scoring import Judge

BERT = transformers.BertConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=24,
    pad_token_id=PADDING,
    initializer_range=0.3,
    num_labels=LABELS,
)
BART = transformers.BartConfig(
    vocab_size=VOCABULARY,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=24,
    init_std=0.3,
    pad_token_id=PADDING,
    bos_token_id=0,
    eos_token_id=2,
    decoder_start_token_id=2,
)


def build(kind, config) -> nn.Module:
    torch.manual_seed(0)
    return kind(config).train()


def predicted_labels(logits: torch.Tensor, every: int) -> torch.Tensor:
    """The class that is predicted, another one at every so many samples."""
    labels = logits.argmax(-1)
    labels[::every] = (labels[::every] + 1) % logits.shape[-1]
    return labels


def multiple_choice():
    model = build(transformers.BertForMultipleChoice, BERT)
    batch = tiny_models.choice_batch()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        logits = model.eval()(**inputs).logits.double()
    labels = predicted_labels(logits, 3)
    losses = functional.cross_entropy(logits, labels, reduction="none")
    return model, {**inputs, "labels": labels}, losses, logits.argmax(-1) == labels, [[i] for i in range(4)]


def of_positions(model, batch, labels, shift=0):
    """Rows by sample of a head that predicts at each position; ``shift`` places before the label."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        logits = model.eval()(**inputs).logits.double()
    logits = logits[:, : logits.shape[1] - shift]
    targets = labels[:, shift:]
    if labels.eq(0).all():  # to be filled with what is predicted, but for every third sample
        labels = labels.clone()
        labels[:, shift:] = predicted_labels(logits, 3)
        mask = batch["attention_mask"][:, shift:] == 0
        labels[:, shift:][mask] = -100
        labels[:, :shift] = -100
        targets = labels[:, shift:]
    kept = targets != -100
    losses = functional.cross_entropy(logits[kept], targets[kept], reduction="none")
    owners = torch.arange(len(labels))[:, None].expand_as(kept)[kept]
    groups = [(owners == sample).nonzero().flatten().tolist() for sample in range(len(labels))]
    return model, {**batch, "labels": labels}, losses, (logits.argmax(-1) == targets)[kept], groups


def token_classification():
    batch = tiny_models.tokens()
    return of_positions(
        build(transformers.BertForTokenClassification, BERT), batch, torch.zeros_like(batch["input_ids"])
    )


def masked_lm():
    batch = tiny_models.masked_lm_batch()
    return of_positions(build(transformers.BertForMaskedLM, BERT), batch, batch["labels"])


def causal_lm():
    batch = tiny_models.tokens()
    return of_positions(tiny_models.language_model("gpt2"), batch, torch.zeros_like(batch["input_ids"]), shift=1)


def seq2seq_lm():
    model = build(transformers.BartForConditionalGeneration, BART)
    batch = tiny_models.tokens()
    labels = torch.randint(3, VOCABULARY, (4, 5), generator=torch.Generator().manual_seed(1))
    labels[1, 3:] = -100
    shifted = torch.cat((torch.full((4, 1), 2), torch.where(labels == -100, PADDING, labels)[:, :-1]), 1)
    model, _, losses, right, groups = of_positions(model, {**batch, "decoder_input_ids": shifted}, labels)
    return model, {**batch, "labels": labels}, losses, right, groups


def question_answering():
    model = build(transformers.BertForQuestionAnswering, transformers.BertConfig(**{**BERT.to_dict(), "num_labels": 2}))
    inputs = tiny_models.tokens(5)
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    hidden = inputs["attention_mask"] == 0
    start = outputs.start_logits.double().masked_fill(hidden, -torch.inf)
    end = outputs.end_logits.double().masked_fill(hidden, -torch.inf)
    starts, ends = start.argmax(-1), end.argmax(-1)
    starts[1] = (starts[1] + 1) % 3  # one end wrong is wrong
    losses = (
        functional.cross_entropy(start, starts, reduction="none")
        + functional.cross_entropy(end, ends, reduction="none")
    ) / 2
    right = (start.argmax(-1) == starts) & (end.argmax(-1) == ends)
    return (
        model,
        {**inputs, "start_positions": starts, "end_positions": ends},
        losses,
        right,
        [[sample] for sample in range(5)],
    )


CASES = {
    case.__name__: case
    for case in (multiple_choice, token_classification, masked_lm, causal_lm, seq2seq_lm, question_answering)
}


@pytest.mark.parametrize("name", CASES)
def test_rows_of_a_head_are_counted_as_its_task_does(name):
    model, batch, losses, right, _ = CASES[name]()
    report = accuracy_under_attack(model, [batch], epsilon=0.3, steps=4, norm="l2", level="sequence", restarts=2)
    assert report.rows == len(right)
    assert report.clean_accuracy == pytest.approx(right.double().mean().item())
    assert report.clean_loss == pytest.approx(losses.mean().item(), rel=1e-4)
    assert report.attacked_loss > report.clean_loss
    assert report.attacked_accuracy <= report.clean_accuracy
    far = accuracy_under_attack(model, [batch], epsilon=30.0, steps=4, norm="l2", level="sequence")
    assert far.attacked_accuracy < max(report.clean_accuracy, 1e-9) or report.clean_accuracy == 0


@pytest.mark.parametrize("name", CASES)
def test_losses_of_a_sample_are_the_mean_over_its_rows(name):
    model, batch, losses, right, groups = CASES[name]()
    report = largest_loss_increase(model, [batch], epsilon=0.2, steps=5, restarts=1)
    expected = torch.stack([losses[rows].mean() for rows in groups])
    torch.testing.assert_close(report.clean_loss, expected, rtol=1e-4, atol=1e-6)
    assert report.correct.tolist() == [bool(right[rows].all()) for rows in groups]
    assert (report.increase > 0).all()
    radius = smallest_flipping_radius(model, [batch], max_epsilon=50.0, steps=5, rounds=4)
    assert torch.equal(radius.radius == 0, ~report.correct)
    smooth = local_smoothness(model, [batch], epsilon=0.2, steps=5)
    assert smooth.counted.all()
    assert (smooth.ascended > smooth.random).all()


@pytest.mark.parametrize("name", ["multiple_choice", "question_answering"])
def test_every_sample_has_its_own_noise_and_radius_however_cut(name):
    model, batch, *_ = CASES[name]()
    samples = next(iter(batch.values())).shape[0]
    radii = torch.linspace(0, 0.4, samples)
    pieces = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 1), slice(1, 3), slice(3, None))]
    whole, cut = (largest_loss_increase(model, one, epsilon=radii, steps=3, restarts=1) for one in ([batch], pieces))
    assert whole.increase[0] == 0
    assert (whole.increase[1:] > 0).all()
    torch.testing.assert_close(cut.largest_loss, whole.largest_loss, rtol=1e-4, atol=1e-6)


def test_padding_of_choices_stays_as_it_is():
    model, batch, *_ = CASES["multiple_choice"]()
    assert (batch["attention_mask"] == 0).any()
    report = local_smoothness(model, [batch], epsilon=0.5, steps=2)
    filled = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 5, batch["input_ids"])}
    torch.testing.assert_close(local_smoothness(model, [filled], epsilon=0.5, steps=2).ascended, report.ascended)
    longer = {key: functional.pad(value, (0, 2)) if value.dim() == 3 else value for key, value in batch.items()}
    torch.testing.assert_close(
        local_smoothness(model, [longer], epsilon=0.5, steps=2).ascended, report.ascended, rtol=1e-4, atol=0
    )


def test_an_end_that_is_not_counted_leaves_the_other():
    head = Head("question_answering")
    mask = torch.ones(3, 4, dtype=torch.long)
    logits = [torch.eye(4, dtype=torch.float64)[:3] * 2, torch.eye(4, dtype=torch.float64)[:3]]
    batch = {
        "attention_mask": mask,
        "start_positions": torch.tensor([0, 2, 1000]),
        "end_positions": torch.tensor([0, 1, 1000]),
    }
    judge = Judge(head, batch, logits)
    assert judge.rows.counted.tolist() == [True, True, False]
    assert judge.rows.all_by_sample(judge.right(logits)).tolist() == [True, False, False]
    start = functional.cross_entropy(logits[0][:2], torch.tensor([0, 2]), reduction="none")
    end = functional.cross_entropy(logits[1][:2], torch.tensor([0, 1]), reduction="none")
    expected = torch.cat(((start + end) / 2, torch.zeros(1, dtype=torch.float64)))
    torch.testing.assert_close(judge.rows.by_sample(judge.losses(logits)), expected)


def test_the_heads_of_pretraining_are_added_by_sample():
    model, batch = tiny_models.bert_pretraining(), tiny_models.pretraining_batch(3)
    report = largest_loss_increase(model, [batch], epsilon=0.1, steps=3)
    for sample in range(3):
        one = {key: value[sample : sample + 1] for key, value in batch.items()}
        with torch.no_grad():
            loss = model.eval()(**one).loss.item()
        assert report.clean_loss[sample].item() == pytest.approx(loss, rel=1e-5)
    assert (report.increase > 0).all()
