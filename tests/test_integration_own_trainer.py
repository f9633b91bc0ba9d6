"""Subclasses of the Trainer with an adversary: their own loss, their own step, and what goes wrong with them."""

import pytest
import tiny_models
import torch
from tiny_loops import assert_same, rows_of
from tiny_trainer import CLASSIFICATION, MASKED_LM, MOVED, ON_THE_WAY, GradientLog, take_in_order, trainer_of
from torch import nn
from transformers import Trainer

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.integrations.transformers import AdversarialTrainer, AdversarialTrainerMixin, adversarial_trainer

WEIGHTED = [{**sample, "weight": torch.tensor(1.0 + index)} for index, sample in enumerate(CLASSIFICATION)]


def focal(logits, labels, weight=None):
    """A loss that no model has: of each sample (1 - p) ** 2 times its cross-entropy."""
    rows = nn.functional.cross_entropy(logits, labels, reduction="none")
    rows = rows * (1 - (-rows).exp()) ** 2
    return (rows if weight is None else rows * weight).mean()


class FocalTrainer(Trainer):
    """A mean over the micro-batch, which ignores the Trainer's count."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        weight = inputs.pop("weight", None)
        outputs = model(**inputs)
        loss = focal(outputs.logits, labels, weight)
        return (loss, outputs) if return_outputs else loss


class CountingTrainer(Trainer):
    """A sum over the Trainer's count, as a token's loss of one's own is."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        rows = outputs.logits.flatten(0, -2)
        loss = nn.functional.cross_entropy(rows, labels.flatten(), reduction="sum", label_smoothing=0.2)
        loss = loss / num_items_in_batch
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


class DividingTrainer(FocalTrainer):
    """Divides by the accumulated steps itself, and says so."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = loss / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


class MeanTrainer(FocalTrainer):
    """Leaves the division to the Trainer, and says so."""

    loss_is_scaled_for_ga = False


class StepTrainer(FocalTrainer):
    """Has a training_step of its own, which gives compute_loss no count and divides."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs) / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


def gradients_of(kind, make, samples, config, tmp_path, **options):
    trainer, steps = trainer_of(make(), tmp_path, samples, config, kind=kind, **options)
    loss = trainer.train().training_loss
    return loss, steps


def bert():
    return tiny_models.bert().double()


def batch_of(samples):
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def plain_focal(config: AdversarialConfig, samples) -> tuple[float, torch.Tensor]:
    """Loss and gradient of the plain loop on the samples in the trainer's order."""
    model = bert()
    objective = AdversarialObjective(
        model,
        config,
        loss=lambda outputs, batch: focal(outputs.logits, batch["labels"], batch.get("weight")),
    )
    figures = objective.backward(batch_of(samples))
    return figures["loss"].item(), tiny_models.Gradients.of(model).flat()


@pytest.fixture
def in_order(monkeypatch):
    take_in_order(monkeypatch)


CASES = {
    "mean": (FocalTrainer, MOVED),
    "divides": (DividingTrainer, MOVED),
    "is divided": (MeanTrainer, MOVED),
    "own step": (StepTrainer, MOVED),
    "divides, freelb": (DividingTrainer, ON_THE_WAY),
    "own step, freelb": (StepTrainer, ON_THE_WAY),
}


@pytest.mark.parametrize(("kind", "config"), CASES.values(), ids=CASES)
def test_a_loss_of_ones_own_is_the_tasks_however_batches_are_split(kind, config, in_order, tmp_path):
    expected_loss, expected = plain_focal(config, CLASSIFICATION)
    for size in (8, 2):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        loss, gradients = gradients_of(adversarial_trainer(kind), bert, CLASSIFICATION, config, tmp_path, **options)
        assert_same(gradients, [expected])
        assert loss == pytest.approx(expected_loss, rel=1e-6)


def test_a_loss_that_divides_by_the_trainers_count_is_a_mean_over_it(in_order, tmp_path):
    results = []
    for size in (8, 2):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        make = lambda: tiny_models.bert_masked_lm().double()  # noqa: E731
        kind = adversarial_trainer(CountingTrainer)
        with pytest.warns(UserWarning, match="is trained through its logits: its task loss is the caller's"):
            results.append(gradients_of(kind, make, MASKED_LM, MOVED, tmp_path, **options))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    assert_same(results[1][1], results[0][1])


def test_alpha_zero_is_the_users_trainer(tmp_path):
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 2}
    kinds = (CountingTrainer, MeanTrainer, DividingTrainer, StepTrainer)
    for kind in kinds:
        own = gradients_of(
            adversarial_trainer(kind), bert, CLASSIFICATION, MOVED.replace(alpha=0.0), tmp_path, **options
        )
        trainer, _ = trainer_of(bert(), tmp_path, CLASSIFICATION, MOVED, **options)
        log = GradientLog()
        parent = kind(model=bert(), args=trainer.args, train_dataset=CLASSIFICATION, callbacks=[log])
        loss = parent.train().training_loss
        assert own[0] == pytest.approx(loss, rel=1e-6), kind
        assert_same(own[1], log.steps)


def test_columns_that_only_the_loss_reads_do_not_reach_the_other_passes(in_order, tmp_path):
    class StrictForSequenceClassification(type(tiny_models.bert())):
        def forward(self, input_ids=None, attention_mask=None, labels=None):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    def strict():
        model = bert()
        model.__class__ = StrictForSequenceClassification
        return model

    class Named(adversarial_trainer(FocalTrainer)):
        task_columns = ("weight",)

    _, expected = plain_focal(MOVED.replace(alpha=5.0), [{**sample} for sample in WEIGHTED])
    for kind, make in ((adversarial_trainer(FocalTrainer), strict), (Named, bert)):
        seen = []
        model = make()
        model.register_forward_pre_hook(lambda m, args, kwargs, seen=seen: seen.append(set(kwargs)), with_kwargs=True)
        _, gradients = gradients_of(
            kind, lambda model=model: model, WEIGHTED, MOVED, tmp_path, remove_unused_columns=False
        )
        assert_same(gradients, [expected])
        assert len(seen) == 4
        assert all("weight" not in names for names in seen)


def test_a_loss_before_the_mixin_wraps_the_adversarial_one(in_order, tmp_path):
    class Doubled(AdversarialTrainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    _, once = gradients_of(AdversarialTrainer, bert, CLASSIFICATION, MOVED, tmp_path)
    _, twice = gradients_of(Doubled, bert, CLASSIFICATION, MOVED, tmp_path)
    assert_same(twice, [2 * once[0]])


def test_a_step_without_the_adversary_is_refused(tmp_path):
    class Replaced(AdversarialTrainer):
        compute_loss = FocalTrainer.compute_loss

    class Direct(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**inputs).loss
            loss.backward()
            return loss.detach()

    class Unguarded(AdversarialTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, inputs)
            loss.backward()
            return loss.detach()

    for kind, missing, culprit in (
        (Replaced, "compute_loss", "FocalTrainer.compute_loss"),
        (adversarial_trainer(Direct), "compute_loss", "Direct.training_step"),
        (Unguarded, "training_step", "Unguarded.training_step"),
    ):
        trainer, _ = trainer_of(bert(), tmp_path, CLASSIFICATION, MOVED, kind=kind)
        message = (
            rf"expected a training that calls {missing} of AdversarialTrainerMixin, .* that did not; .*{culprit} do"
        )
        with pytest.raises(RuntimeError, match=message):
            trainer.train()


def test_outputs_that_the_loss_does_not_come_from_are_refused(tmp_path):
    class Detached(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss, outputs.logits = outputs.loss, outputs.logits.detach()
            return (loss, outputs) if return_outputs else loss

    class Alone(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    class Twice(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = (outputs.loss + model(**inputs).loss) / 2
            return (loss, outputs) if return_outputs else loss

    for kind, error, message in (
        (
            Detached,
            ValueError,
            r"Detached.compute_loss: expected outputs of the pass that the loss is of, got logits wi",
        ),
        (Alone, TypeError, r"Alone.compute_loss: expected \(loss, outputs\) with return_outputs=True, got Tensor"),
        (Twice, RuntimeError, r"once"),
    ):
        trainer, _ = trainer_of(bert(), tmp_path, CLASSIFICATION, MOVED, kind=adversarial_trainer(kind))
        with pytest.raises(error, match=message):
            trainer.train()


def test_the_one_liner_makes_one_class_of_each():
    kind = adversarial_trainer(FocalTrainer)
    assert kind is adversarial_trainer(FocalTrainer)
    assert kind.__mro__[1:4] == (AdversarialTrainerMixin, FocalTrainer, Trainer)
    assert adversarial_trainer(Trainer) is AdversarialTrainer
    assert adversarial_trainer(kind) is kind
    with pytest.raises(TypeError, match=r"^trainer: expected a subclass of transformers.Trainer, got"):
        adversarial_trainer(nn.Linear)


def test_micro_batches_of_a_batch_are_its_rows():
    parts = rows_of(batch_of(CLASSIFICATION), 3)
    assert [len(part["labels"]) for part in parts] == [3, 3, 2]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), batch_of(CLASSIFICATION)["input_ids"])
