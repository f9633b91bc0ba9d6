"""``AdversarialTrainer``: its gradients, its noise over micro-batches and processes, its log and its checkpoints."""

import pytest
import tiny_models
import torch
from published_data import PUBLISHED, needs_published
from tiny_loops import watched
from tiny_trainer import CLASSIFICATION, MASKED_LM, MOVED, REGRESSION, GradientLog, trainer_of
from torch import nn
from transformers import Trainer, TrainingArguments

from alum_kernels import AdversarialObjective
from alum_kernels.integrations.transformers import STATE_NAME, AdversarialTrainer


def summed_cross_entropy(outputs, labels, num_items_in_batch=None):
    """A loss function that relies on the count, as one written for the Trainer does."""
    rows = outputs.logits.flatten(0, -2)
    return nn.functional.cross_entropy(rows, labels.flatten(), reduction="sum") / num_items_in_batch


def mean_cross_entropy(outputs, labels, num_items_in_batch=None):
    """One that ignores it."""
    return nn.functional.cross_entropy(outputs.logits.flatten(0, -2), labels.flatten())


CASES = {
    "classification": (tiny_models.bert, CLASSIFICATION, {}),
    "regression": (lambda: tiny_models.bert(labels=1), REGRESSION, {}),
    "masked_lm": (tiny_models.bert_masked_lm, MASKED_LM, {}),
    "gpt2": (tiny_models.gpt2, CLASSIFICATION, {}),
    "label_smoothing": (tiny_models.bert, CLASSIFICATION, {"label_smoothing_factor": 0.1}),
    "masked_lm_smoothing": (tiny_models.bert_masked_lm, MASKED_LM, {"label_smoothing_factor": 0.1}),
    "summed_loss_func": (tiny_models.bert_masked_lm, MASKED_LM, {"compute_loss_func": summed_cross_entropy}),
    "mean_loss_func": (tiny_models.bert_masked_lm, MASKED_LM, {"compute_loss_func": mean_cross_entropy}),
}


@pytest.mark.parametrize("case", CASES)
def test_four_micro_batches_of_two_give_the_gradient_of_one_of_eight(case, tmp_path):
    make, samples, options = CASES[case]
    results = []
    for size, accumulation in ((8, 1), (2, 4), (3, 3)):
        trainer, gradients = trainer_of(
            make().double(),
            tmp_path,
            samples,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            **options,
        )
        loss = trainer.train().training_loss
        results.append((loss, gradients[0]))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        # the Trainer's label smoother sums in fp32, whatever the dtype of the logits
        rtol, atol = (1e-5, 1e-8) if "label_smoothing_factor" in options else (1e-8, 1e-12)
        torch.testing.assert_close(gradient, results[0][1], rtol=rtol, atol=atol)


def test_without_a_count_the_trainer_itself_divides(tmp_path):
    results = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = tiny_models.bert().double()
        model.accepts_loss_kwargs = False
        trainer, gradients = trainer_of(
            model,
            tmp_path,
            CLASSIFICATION,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        assert not trainer.model_accepts_loss_kwargs
        trainer.train()
        results.append(gradients[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-12)


def test_a_step_is_the_objective_with_the_first_seed(tmp_path):
    """The gradient is that of task mean + alpha * divergence mean over the step's samples, and logged as such."""
    trainer, gradients = trainer_of(tiny_models.bert().double(), tmp_path, CLASSIFICATION)
    trainer.train()
    order = [CLASSIFICATION[index] for index in trainer_order(trainer)]
    batch = {key: torch.stack([sample[key] for sample in order]) for key in CLASSIFICATION[0]}
    model = tiny_models.bert().double()
    objective = AdversarialObjective(model, MOVED)
    output = objective(**batch)
    output.loss.backward()
    torch.testing.assert_close(gradients[0], tiny_models.Gradients.of(model).flat(), rtol=1e-9, atol=1e-13)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    expected = {f"adv_{name}": value for name, value in objective.telemetry.read().items()}
    assert {name: value for name, value in logged.items() if name.startswith("adv_")} == pytest.approx(expected)
    assert {"adv_divergence", "adv_ascent_gain", "adv_delta_rms", "adv_clipped"} <= set(expected)


def trainer_order(trainer: AdversarialTrainer) -> list[int]:
    """Positions of the samples that the trainer's first epoch takes, in its order."""
    by_ids = {tuple(sample["input_ids"].tolist()): place for place, sample in enumerate(CLASSIFICATION)}
    torch.manual_seed(trainer.args.seed)
    (batch,) = iter(trainer.get_train_dataloader())
    return [by_ids[tuple(ids)] for ids in batch["input_ids"].tolist()]


def test_alpha_zero_is_the_parent(tmp_path):
    plain, ours = GradientLog(), GradientLog()
    for log in (plain, ours):
        trainer, _ = trainer_of(tiny_models.bert(0.2), tmp_path, CLASSIFICATION, MOVED.replace(alpha=0.0), max_steps=2)
        if log is plain:
            trainer = Trainer(model=tiny_models.bert(0.2), args=trainer.args, train_dataset=CLASSIFICATION)
        trainer.add_callback(log)
        trainer.train()
    for theirs, own in zip(plain.steps, ours.steps, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-7)


def test_a_micro_batch_without_labelled_positions_adds_nothing(tmp_path):
    unlabelled = [{**sample, "labels": torch.full_like(sample["labels"], -100)} for sample in MASKED_LM[:4]]
    for options in ({}, {"label_smoothing_factor": 0.1}, {"compute_loss_func": summed_cross_entropy}):
        results = []
        for size, accumulation in ((8, 1), (1, 8)):
            trainer, gradients = trainer_of(
                tiny_models.bert_masked_lm().double(),
                tmp_path,
                unlabelled + MASKED_LM[4:],
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                **options,
            )
            loss = trainer.train().training_loss
            results.append((loss, gradients[0]))
        assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
        rtol, atol = (1e-5, 1e-8) if "label_smoothing_factor" in options else (1e-8, 1e-12)
        torch.testing.assert_close(results[1][1], results[0][1], rtol=rtol, atol=atol)


def test_each_step_has_a_seed_and_each_micro_batch_its_place(tmp_path, monkeypatch):
    places = []
    forward = AdversarialObjective.forward

    def watch(self, batch, **options):
        places.append((options["seed"].item(), options["sample_offset"], len(batch["labels"])))
        return forward(self, batch, **options)

    monkeypatch.setattr(AdversarialObjective, "forward", watch)
    trainer, _ = trainer_of(
        tiny_models.bert(),
        tmp_path,
        CLASSIFICATION,
        max_steps=3,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    # batches of an epoch of 8 samples: 3 + 3, then the 2 that are left
    assert [place[1:] for place in places] == [(0, 3), (3, 3), (0, 2), (0, 3), (3, 3)]
    seeds = [place[0] for place in places]
    assert seeds[0] == seeds[1]
    assert seeds[3] == seeds[4]
    assert len(set(seeds)) == 3
    trainer.train()
    assert len({place[0] for place in places}) == 6


def test_evaluation_is_the_parents(tmp_path, monkeypatch):
    trainer, _ = trainer_of(
        tiny_models.bert(0.2),
        tmp_path,
        CLASSIFICATION,
        eval_dataset=CLASSIFICATION,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    evaluated = [logged for logged in trainer.state.log_history if "eval_loss" in logged]
    assert not any(name.startswith("adv_") for name in evaluated[0])
    monkeypatch.setattr(AdversarialObjective, "forward", lambda *args, **options: pytest.fail("adversarial pass"))
    batch = tiny_models.classification_batch(8)
    expected = trainer.model.eval()(**batch).loss.item()
    assert evaluated[0]["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.predict(CLASSIFICATION).metrics["test_loss"] == pytest.approx(expected, rel=1e-5)


def test_outputs_are_those_of_the_clean_pass(tmp_path):
    trainer, _ = trainer_of(tiny_models.bert(), tmp_path, CLASSIFICATION)
    model, batch = trainer.model.train(), tiny_models.classification_batch(8)
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True, num_items_in_batch=16)
    assert torch.equal(outputs.logits, model(**batch).logits)
    assert "labels" in batch
    alone = trainer.compute_loss(model, batch)
    assert alone.dim() == 0
    task = nn.functional.cross_entropy(outputs.logits, batch["labels"])
    assert 2 * loss > task
    torch.testing.assert_close(2 * loss - task, alone - task, rtol=0.5, atol=0)


@pytest.mark.parametrize("dropout", ["shared", "independent"])
def test_a_resumed_run_gives_the_numbers_of_an_uninterrupted_one(tmp_path, dropout):
    options = {
        "config": MOVED.replace(dropout=dropout, signal_check_interval=2 if dropout == "shared" else 0),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "optim": "adamw_torch",
    }
    whole, whole_gradients = trainer_of(tiny_models.bert(0.2), tmp_path / "whole", CLASSIFICATION, **options)
    whole.train()
    assert (tmp_path / "whole" / "checkpoint-3" / STATE_NAME).is_file()
    resumed, gradients = trainer_of(tiny_models.bert(0.2, seed=1), tmp_path / "resumed", CLASSIFICATION, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert len(gradients) == 3
    for expected, gradient in zip(whole_gradients[3:], gradients, strict=True):
        assert torch.equal(gradient, expected)
    logs = [[log for log in run.state.log_history if "loss" in log] for run in (whole, resumed)]
    assert logs[0] == logs[1]

    (tmp_path / "whole" / "checkpoint-3" / STATE_NAME).unlink()
    stateless, gradients = trainer_of(tiny_models.bert(0.2), tmp_path / "stateless", CLASSIFICATION, **options)
    with pytest.warns(UserWarning, match=f"checkpoint-3: no {STATE_NAME}, so the noise starts anew"):
        stateless.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert not torch.equal(gradients[0], whole_gradients[3])


def test_bf16_perturbs_within_the_trainers_autocast(tmp_path):
    results = {}
    for bf16 in (False, True):
        trainer, gradients = trainer_of(tiny_models.bert(), tmp_path, CLASSIFICATION, bf16=bf16)
        seen = []
        # the first linear layer shows in which precision each of the four passes ran
        layer = trainer.model.bert.encoder.layer[0].attention.self.query
        handle = layer.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output.dtype))
        trainer.train()
        handle.remove()
        assert seen == [torch.bfloat16 if bf16 else torch.float32] * 4
        assert gradients[0].dtype == torch.float32
        results[bf16] = (trainer.state.log_history[0], gradients[0])
    assert results[True][0]["loss"] == pytest.approx(results[False][0]["loss"], rel=0.05)
    assert torch.cosine_similarity(results[True][1], results[False][1], 0) > 0.98


def test_fp16_of_the_trainer_is_fp32_on_a_cpu(tmp_path):
    """Accelerate neither casts nor scales there, and says nothing."""
    results = []
    for fp16 in (False, True):
        trainer, gradients = trainer_of(tiny_models.bert(), tmp_path, CLASSIFICATION, fp16=fp16)
        seen = watched(trainer.model.bert.encoder.layer[0].attention.self.query)
        trainer.train()
        assert seen == [torch.float32] * 4
        assert trainer.accelerator.scaler is None
        results.append(gradients[0])
    assert torch.equal(*results)


def test_a_model_of_model_init_gets_an_objective_of_its_own(tmp_path):
    trainer, gradients = trainer_of(None, tmp_path, CLASSIFICATION, model_init=lambda: tiny_models.bert())
    trainer.train()
    first = trainer.objective
    trainer.train()
    assert trainer.objective is not first
    assert trainer.objective.model is trainer.model
    assert torch.equal(gradients[0], gradients[1])
    assert len(trainer.model.bert.embeddings.word_embeddings._forward_hooks) == 1


def test_gradient_checkpointing_changes_nothing(tmp_path):
    results = []
    for checkpointing in (False, True):
        model = tiny_models.bert(0.2)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trainer, gradients = trainer_of(model, tmp_path, CLASSIFICATION)
        trainer.train()
        results.append(gradients[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


def test_what_is_not_supported_is_refused(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match=r"^adversarial: expected an AdversarialConfig, got dict"):
        trainer_of(tiny_models.bert(), tmp_path, CLASSIFICATION, {"alpha": 1.0})
    with pytest.raises(ValueError, match=r"^model: expected a module or DistributedDataParallel, got DataParallel"):
        trainer_of(nn.DataParallel(tiny_models.bert()), tmp_path, CLASSIFICATION)
    with pytest.raises(ValueError, match="no head recognised for BertModel"):
        trainer_of(tiny_models.bert().bert, tmp_path, CLASSIFICATION)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
        with pytest.raises(ValueError, match=r"^args: expected one device a process, got 2 GPUs"):
            trainer_of(tiny_models.bert(), tmp_path, CLASSIFICATION)
    with pytest.raises(TypeError, match="adversarial"):
        AdversarialTrainer(model=tiny_models.bert())


@needs_published
def test_cola_trains_from_its_published_files(tmp_path):
    lines = (PUBLISHED / "glue" / "CoLA" / "train.tsv").read_text(encoding="utf-8").splitlines()[:64]
    samples = []
    for _, label, _, sentence in (line.split("\t") for line in lines):
        # bytes stand in for a tokenizer: what is tested is the path from file to log
        ids = torch.tensor([3 + byte % 45 for byte in sentence.encode()[:20]])
        attention_mask = (torch.arange(20) < len(ids)).long()
        input_ids = nn.functional.pad(ids, (0, 20 - len(ids)), value=tiny_models.PADDING)
        samples.append({"input_ids": input_ids, "attention_mask": attention_mask, "labels": int(label)})
    trainer, _ = trainer_of(tiny_models.bert(labels=2), tmp_path, samples, max_steps=24, optim="adamw_torch")
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert sum(losses[-8:]) < sum(losses[:8])
