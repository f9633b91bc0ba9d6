"""``AdversarialTrainer`` with the methods that need more of a trainer than one backward a batch."""

import pytest
import tiny_models
import torch
from test_trainer import trainer_order
from tiny_trainer import CLASSIFICATION, MASKED_LM, MOVED, trainer_of

from alum_kernels import AdversarialConfig, AdversarialObjective

BALL = {"std": 0.1, "step_size": 0.2, "epsilon": 0.3}
METHODS = {
    "freelb": AdversarialConfig.freelb(**BALL),
    "fgm": AdversarialConfig.fgm(step_size=0.3, epsilon=0.3),
    "yopo": AdversarialConfig.yopo(**BALL),
    "pgd": AdversarialConfig.pgd(**BALL),
    "freeat": AdversarialConfig.freeat(**BALL),
}


def batch_of(trainer) -> dict:
    order = [CLASSIFICATION[index] for index in trainer_order(trainer)]
    return {key: torch.stack([sample[key] for sample in order]) for key in CLASSIFICATION[0]}


@pytest.mark.parametrize("method", ["freelb", "fgm", "yopo", "pgd"])
def test_micro_batches_add_up_and_the_log_has_the_whole_loss(method, tmp_path):
    results = []
    for size, accumulation in ((8, 1), (2, 4), (3, 3)):
        trainer, gradients = trainer_of(
            tiny_models.bert().double(),
            tmp_path,
            CLASSIFICATION,
            METHODS[method],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        results.append((trainer.state.log_history[0]["loss"], gradients[0]))
    model = tiny_models.bert().double()
    objective = AdversarialObjective(model, METHODS[method])
    expected = objective.backward(batch_of(trainer_of(model, tmp_path, CLASSIFICATION, METHODS[method])[0]))
    for loss, gradient in results:
        assert loss == pytest.approx(expected["loss"].item(), rel=1e-5)
        torch.testing.assert_close(gradient, tiny_models.Gradients.of(model).flat(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("accepts", [True, False])
def test_the_share_of_a_micro_batch_is_the_parents(accepts, tmp_path):
    results = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = tiny_models.bert_masked_lm().double()
        model.accepts_loss_kwargs = accepts
        samples = MASKED_LM if accepts else MASKED_LM[:1] * 8  # the mean of means is the mean where counts are equal
        trainer, gradients = trainer_of(
            model,
            tmp_path,
            samples,
            METHODS["freelb"].replace(std=0.0),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        results.append(gradients[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-12)


def test_local_linearity_of_micro_batches_adds_up_over_unequal_labels(tmp_path):
    results = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer, gradients = trainer_of(
            tiny_models.bert_masked_lm().double(),
            tmp_path,
            MASKED_LM,
            AdversarialConfig.llr(fused_head=False),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        results.append(gradients[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-7, atol=1e-10)


def test_a_replayed_batch_updates_the_model_each_time(tmp_path):
    config = METHODS["freeat"]
    trained = tiny_models.bert().double()
    trainer, gradients = trainer_of(trained, tmp_path, CLASSIFICATION, config, max_grad_norm=0.5)
    trainer.train()
    model = tiny_models.bert().double()
    objective, optimizer = AdversarialObjective(model, config), torch.optim.SGD(model.parameters(), lr=0.1)
    updates = []

    def update() -> None:
        updates.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
        optimizer.zero_grad()

    objective.backward(batch_of(trainer), update=update)
    assert len(updates) == config.steps == 3
    assert all(norm > 0.5 for norm in updates)
    update()
    assert len(gradients) == 1
    for own, theirs in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-12)
    assert trainer.state.global_step == 1


def test_a_replayed_batch_cannot_be_one_of_several(tmp_path):
    with pytest.raises(ValueError, match=r"^args: expected gradient_accumulation_steps 1 for freeat"):
        trainer_of(tiny_models.bert(), tmp_path, CLASSIFICATION, METHODS["freeat"], gradient_accumulation_steps=2)


def test_the_teacher_follows_the_trainers_optimizer_and_a_checkpoint_carries_it(tmp_path):
    config = MOVED.replace(proximal=2.0, proximal_momentum=0.5)
    options = {"save_strategy": "steps", "save_steps": 2, "seed": 3}
    whole = tiny_models.bert().double()
    trainer, _ = trainer_of(whole, tmp_path / "whole", CLASSIFICATION, config, max_steps=4, **options)
    trainer.train()
    half = tiny_models.bert().double()
    trainer, _ = trainer_of(half, tmp_path / "whole", CLASSIFICATION, config, max_steps=4, **options)
    for _ in range(2):  # the same trainer again, whose teacher is at the end
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        for own, theirs in zip(half.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-12)
    free = tiny_models.bert().double()
    trainer, _ = trainer_of(free, tmp_path / "free", CLASSIFICATION, MOVED, max_steps=4, seed=3)
    trainer.train()
    differences = [
        (own - theirs).abs().max() for own, theirs in zip(free.parameters(), whole.parameters(), strict=True)
    ]
    assert max(differences) > 1e-6


def test_a_curriculum_goes_by_the_trainers_steps(tmp_path):
    logs = []
    for config in (
        MOVED.replace(start=0.5),
        MOVED.replace(start=2),
        MOVED.replace(alpha_schedule=((0.5, 0), (0.5, 1))),
    ):
        trainer, _ = trainer_of(tiny_models.bert().double(), tmp_path, CLASSIFICATION, config, max_steps=4)
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    for log in logs:
        assert [entry.get("adv_divergence", 0) > 0 for entry in log] == [False, False, True, True]
        assert [entry["loss"] for entry in log] == pytest.approx([entry["loss"] for entry in logs[0]], rel=1e-6)
