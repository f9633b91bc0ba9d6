"""``AdversarialTrainer`` with steps that cost less."""

import pytest
import tiny_models
import torch
from tiny_trainer import CLASSIFICATION, MASKED_LM, MOVED, trainer_of


@pytest.mark.parametrize("task", ["classification", "masked_lm"])
def test_low_memory_gives_the_gradient_of_the_exact_step_however_it_is_split(task, tmp_path):
    results = []
    for memory in ("high", "low"):
        for size, accumulation in ((8, 1), (2, 4)):
            model = tiny_models.bert() if task == "classification" else tiny_models.bert_masked_lm()
            trainer, gradients = trainer_of(
                model.double(),
                tmp_path,
                CLASSIFICATION if task == "classification" else MASKED_LM,
                MOVED.replace(memory=memory),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
            )
            trainer.train()
            results.append((trainer.state.log_history[0]["loss"], gradients[0]))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("task", ["classification", "masked_lm"])
def test_the_task_counts_in_full_where_a_part_is_perturbed(task, tmp_path):
    """With alpha near zero the gradient is that of standard training, of the clean pass in two parts too."""
    results = []
    for fraction, size, accumulation in ((1.0, 8, 1), (0.5, 8, 1), (0.5, 4, 2)):
        model = tiny_models.bert() if task == "classification" else tiny_models.bert_masked_lm()
        trainer, gradients = trainer_of(
            model.double(),
            tmp_path,
            CLASSIFICATION if task == "classification" else MASKED_LM,
            MOVED.replace(adversarial_fraction=fraction, alpha=1e-30),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        results.append((trainer.state.log_history[0]["loss"], gradients[0]))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-6, atol=1e-10)


def test_samples_that_have_an_index_keep_their_perturbation(tmp_path):
    indexed = [{**sample, "sample_index": index} for index, sample in enumerate(CLASSIFICATION)]
    model = tiny_models.bert()
    forwards = []
    model.bert.encoder.register_forward_hook(lambda *_: forwards.append(1))
    config = MOVED.replace(delta_lifetime=2, steps=1)
    trainer, _ = trainer_of(
        model, tmp_path, indexed, config, max_steps=-1, num_train_epochs=4, per_device_train_batch_size=4
    )
    trainer.train()
    # two batches an epoch, of other samples each time: an epoch of ascents, one without
    assert len(forwards) == 2 * (3 + 2 + 3 + 2)


def test_without_an_index_the_trainer_says_what_it_needs(tmp_path):
    trainer, _ = trainer_of(tiny_models.bert(), tmp_path, CLASSIFICATION, MOVED.replace(delta_lifetime=2))
    with pytest.raises(
        ValueError, match=r"^train_dataset: expected a column 'sample_index' with delta_lifetime 2, got"
    ):
        trainer.train()


def test_an_index_is_not_shown_to_the_model_in_evaluation(tmp_path):
    indexed = [{**sample, "sample_index": index} for index, sample in enumerate(CLASSIFICATION)]

    class StrictForSequenceClassification(type(tiny_models.bert())):
        def forward(self, input_ids=None, attention_mask=None, labels=None):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    model = tiny_models.bert()
    model.__class__ = StrictForSequenceClassification
    config = MOVED.replace(delta_lifetime=2)
    trainer, _ = trainer_of(model, tmp_path, indexed, config, eval_dataset=indexed)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
