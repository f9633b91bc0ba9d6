"""Robustness figures of every head: what counts as a row, whose sample it is, and what it loses."""

from dataclasses import dataclass

import pytest
import tiny_models
import torch
from tiny_models import PADDING
from torch import Tensor, nn
from torch.nn import functional

from alum_kernels.adversarial.heads import Head
from alum_kernels.backends.reference import noise_init as reference_noise
from alum_kernels.evaluation import (
    accuracy_under_attack,
    largest_loss_increase,
    local_smoothness,
    smallest_flipping_radius,
)
from alum_kernels.evaluation.scoring import Judge

FAMILY_OF = {
    "choice": "bert",
    "token_labels": "bert",
    "masked_lm": "bert",
    "causal_lm": "gpt2",
    "seq2seq": "bart",
    "spans": "bert",
}


@dataclass
class Case:
    """A model in float64 whose predictions are the labels, of every third sample others.

    Attributes:
        model, batch: the model, and its arguments with labels.
        inputs: its arguments without labels.
        targets: of each field of logits, the class of each row, -100 where none counts.
        embeddings: the module that is perturbed.
    """

    model: nn.Module
    batch: dict[str, Tensor]
    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    embeddings: nn.Module

    def rows(self, outputs) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of each row, whether it is right, and whose sample it is."""
        losses, right, owners = [], [], []
        for field, targets in self.targets.items():
            logits, kept = self.logits(outputs, field), targets != -100
            losses.append(functional.cross_entropy(logits[kept], targets[kept], reduction="none"))
            right.append(logits[kept].argmax(-1) == targets[kept])
            owners.append(torch.arange(len(targets)).view(-1, *[1] * (targets.dim() - 1)).expand_as(targets)[kept])
        return torch.cat(losses), torch.cat(right), torch.cat(owners)

    def counted(self, outputs) -> tuple[Tensor, Tensor]:
        """Loss and rightness of what is counted: a row, but of the two ends of an answer the sample."""
        losses, right, owners = self.rows(outputs)
        if "start_logits" not in self.targets:
            return losses, right
        samples = owners.unique()
        return (
            torch.stack([losses[owners == sample].mean() for sample in samples]),
            torch.stack([right[owners == sample].all() for sample in samples]),
        )

    def logits(self, outputs, field: str) -> Tensor:
        if field in ("start_logits", "end_logits"):
            return outputs[field].masked_fill(self.inputs["attention_mask"] == 0, -torch.inf)
        return outputs[field]


def make(task: str) -> Case:
    model = tiny_models.make(FAMILY_OF[task], task, dtype=torch.float64).eval()
    batch = tiny_models.batch(task, 5)
    names = ("start_positions", "end_positions") if task == "spans" else ("labels",)
    inputs = {name: value for name, value in batch.items() if name not in names}
    embeddings = model.get_encoder().embed_tokens if task == "seq2seq" else model.get_input_embeddings()
    case = Case(model, batch, inputs, {}, embeddings)
    fields = ("start_logits", "end_logits") if task == "spans" else ("logits",)
    for _ in range(6 if task == "seq2seq" else 1):  # what a decoder predicts at a position depends on labels before it
        if task == "seq2seq":
            before = torch.where(batch["labels"] == -100, PADDING, batch["labels"])[:, :-1]
            inputs["decoder_input_ids"] = functional.pad(before, (1, 0), value=model.config.decoder_start_token_id)
        with torch.no_grad():
            outputs = model(**inputs)
        for name, field in zip(names, fields, strict=True):
            logits = case.logits(outputs, field)
            ignored = next_token(batch[name]) == -100 if task == "causal_lm" else batch[name] == -100
            targets = logits.argmax(-1)
            targets[::3] = (targets[::3] + 1) % (3 if task in ("spans", "choice") else logits.shape[-1])
            case.targets[field] = targets.masked_fill(ignored, -100)
            batch[name] = case.targets[field]
    if task == "causal_lm":  # a position predicts the label of the next one
        batch["labels"] = functional.pad(case.targets["logits"][:, :-1], (1, 0), value=-100)
    return case


def next_token(labels: Tensor) -> Tensor:
    return functional.pad(labels[:, 1:], (0, 1), value=-100)


def attacked_by_hand(case: Case, epsilon: float, steps: int, restarts: int, seed: int) -> tuple[float, float]:
    """Accuracy and loss under an l2 attack on each sequence, in plain PyTorch."""
    mask = case.inputs["attention_mask"].flatten(0, -2)
    clean = case.embeddings(case.inputs["input_ids"].flatten(0, -2)).detach()

    def outputs(embeds: Tensor):
        handle = case.embeddings.register_forward_hook(lambda *_: embeds)
        try:
            return case.model(**case.inputs)
        finally:
            handle.remove()

    width = epsilon / (mask.sum(1) * clean.shape[2]).double().sqrt()
    with torch.no_grad():
        _, robust = case.counted(outputs(clean))
    largest = torch.full(robust.shape, -torch.inf, dtype=torch.float64)
    for restart in range(restarts):
        noise = {"mask": mask, "distribution": "uniform", "stream": restart, "sample_offset": 0}
        unit = reference_noise.initial_delta(clean.shape, torch.tensor([seed]), torch.float64, std=1.0, **noise)
        delta = unit * width[:, None, None]
        for step in range(steps + 1):
            point = (clean + delta).requires_grad_()
            found = outputs(point)
            losses, right = case.counted(found)
            robust = robust & right
            if step == steps:
                largest = torch.maximum(largest, losses.detach())
                break
            (grad,) = torch.autograd.grad(case.rows(found)[0].sum(), point)
            grad = grad * mask.unsqueeze(-1)
            delta = delta + 2.5 * epsilon / steps * grad / grad.flatten(1).norm(dim=1)[:, None, None]
            delta = delta * (epsilon / delta.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None]
    return robust.double().mean().item(), largest.mean().item()


@pytest.mark.parametrize("task", FAMILY_OF)
def test_rows_of_a_head_are_counted_and_attacked_as_its_task_does(task):
    case = make(task)
    with torch.no_grad():
        losses, right = case.counted(case.model(**case.inputs))
    search = {"epsilon": 0.15, "steps": 3, "restarts": 2, "seed": 5}
    report = accuracy_under_attack(case.model, [case.batch], norm="l2", level="sequence", **search)
    assert report.rows == len(right)
    assert report.clean_accuracy == pytest.approx(right.double().mean().item())
    assert report.clean_loss == pytest.approx(losses.mean().item(), rel=1e-9)
    accuracy, loss = attacked_by_hand(case, **search)
    assert 0 < accuracy < report.clean_accuracy < 1
    assert report.attacked_accuracy == pytest.approx(accuracy)
    assert report.attacked_loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("task", FAMILY_OF)
def test_losses_of_a_sample_are_the_mean_over_its_rows(task):
    case = make(task)
    with torch.no_grad():
        losses, right, owners = case.rows(case.model(**case.inputs))
    report = largest_loss_increase(case.model, [case.batch], epsilon=0.2, steps=5, restarts=1)
    expected = torch.stack([losses[owners == sample].mean() for sample in range(5)])
    torch.testing.assert_close(report.clean_loss, expected, rtol=1e-9, atol=1e-12)
    assert report.correct.tolist() == [bool(right[owners == sample].all()) for sample in range(5)]
    assert (report.increase > 0).all()
    radius = smallest_flipping_radius(case.model, [case.batch], max_epsilon=50.0, steps=5, rounds=4)
    assert torch.equal(radius.radius == 0, ~report.correct)
    smooth = local_smoothness(case.model, [case.batch], epsilon=0.2, steps=5)
    assert smooth.counted.all()
    assert (smooth.ascended > smooth.random).all()


@pytest.mark.parametrize("task", ["choice", "spans"])
def test_every_sample_has_its_own_noise_and_radius_however_cut(task):
    case = make(task)
    radii = torch.linspace(0, 0.4, 5)
    pieces = [
        {key: value[part] for key, value in case.batch.items()} for part in (slice(0, 1), slice(1, 3), slice(3, None))
    ]
    whole, cut = (
        largest_loss_increase(case.model, one, epsilon=radii, steps=3, restarts=1) for one in ([case.batch], pieces)
    )
    torch.testing.assert_close(whole.increase[0], torch.zeros_like(whole.increase[0]), rtol=0, atol=1e-12)
    assert (whole.increase[1:] > 0).all()
    torch.testing.assert_close(cut.largest_loss, whole.largest_loss, rtol=1e-9, atol=1e-12)


def test_padding_of_choices_stays_as_it_is():
    case = make("choice")
    model, batch = case.model, case.batch
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
