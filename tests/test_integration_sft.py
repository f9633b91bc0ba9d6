"""TRL's ``SFTTrainer`` with an adversary: its loss, its metrics, and no logits."""

import pytest
import tiny_models
import torch
import transformers
from tiny_loops import FAR, FROM_FP32, assert_alike, assert_same, watched
from tiny_trainer import MOVED, ON_THE_WAY, ONE_STEP, GradientLog, take_in_order

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.integrations.transformers import AdversarialTrainerMixin, adversarial_trainer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

BATCH = tiny_models.causal_lm_batch(8)
ROWS = [
    {"input_ids": ids[:length].tolist(), "labels": labels[:length].tolist()}
    for ids, labels, length in zip(BATCH["input_ids"], BATCH["labels"], BATCH["attention_mask"].sum(1), strict=True)
]


def words():
    """A tokenizer of the tiny vocabulary."""
    vocabulary = {f"w{index}": index for index in range(tiny_models.VOCABULARY)}
    return transformers.BertTokenizer(vocab=vocabulary, pad_token="w1")


@pytest.fixture
def tokenizer():
    return words()


@pytest.fixture(autouse=True)
def in_order(monkeypatch):
    take_in_order(monkeypatch)


def sft(folder, tokenizer, config, model=None, kind=None, **options):
    log = GradientLog()
    extra = {} if config is None else {"adversarial": config}
    trainer = (kind or adversarial_trainer(trl.SFTTrainer))(
        model=model or llama(),
        args=trl.SFTConfig(str(folder), **{**ONE_STEP, "bf16": False, **options}),
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=tokenizer,
        callbacks=[log],
        **extra,
    )
    return trainer, log.steps


def llama():
    model = tiny_models.language_model("llama").double()
    model.config._name_or_path = "tiny"
    return model


def plain(config):
    model = llama()
    objective = AdversarialObjective(model, config)
    figures = objective.backward(BATCH)
    return figures["loss"].item(), tiny_models.Gradients.of(model).flat(), objective.telemetry.read()


@pytest.mark.parametrize("config", [MOVED, ON_THE_WAY], ids=["alum", "freelb"])
def test_micro_batches_leave_the_gradients_of_the_plain_loop(config, tokenizer, tmp_path):
    loss, gradient, figures = plain(config)
    for size in (8, 2):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        trainer, gradients = sft(tmp_path, tokenizer, config, **options)
        trainer.train()
        assert trainer.objective.linear_head is not None
        # TRL's own forward scores in fp32
        torch.testing.assert_close(gradients[0], gradient, rtol=1e-4, atol=1e-6)
        logged = trainer.state.log_history[0]
        assert logged["num_tokens"] == BATCH["attention_mask"].sum().item()
        assert logged["loss"] == pytest.approx(loss, rel=1e-4)
        if size == 8:
            found = {name[4:]: value for name, value in logged.items() if name.startswith("adv_")}
            assert found == pytest.approx(figures, rel=1e-3)


@pytest.mark.parametrize("config", [FAR, ON_THE_WAY], ids=["alum", "freelb"])
def test_bf16_trains_as_fp32_does(config, tokenizer, tmp_path):
    results = []
    for bf16 in (False, True):
        trainer, gradients = sft(tmp_path, tokenizer, config, llama().float(), bf16=bf16)
        seen = watched(trainer.model.model.layers[0].self_attn.q_proj)
        trainer.train()
        assert set(seen) == {torch.bfloat16 if bf16 else torch.float32}
        assert trainer.objective.linear_head is not None
        assert gradients[0].dtype == torch.float32
        results.append(gradients)
    assert_alike(results[1], results[0], FROM_FP32[torch.bfloat16])


def test_fp16_is_fp32_on_a_cpu(tokenizer, tmp_path):
    """Accelerate neither casts nor scales there, and says nothing."""
    trainer, _ = sft(tmp_path, tokenizer, FAR, llama().float(), fp16=True)
    seen = watched(trainer.model.model.layers[0].self_attn.q_proj)
    trainer.train()
    assert set(seen) == {torch.float32}
    assert trainer.accelerator.scaler is None


def test_the_metrics_are_those_of_the_users_trainer(tokenizer, tmp_path):
    ours, _ = sft(tmp_path, tokenizer, MOVED, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    theirs, _ = sft(
        tmp_path, tokenizer, None, kind=trl.SFTTrainer, gradient_accumulation_steps=2, per_device_train_batch_size=4
    )
    ours.train()
    theirs.train()
    names = ("entropy", "mean_token_accuracy", "num_tokens")
    found, expected = ([run.state.log_history[0][name] for name in names] for run in (ours, theirs))
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[2] == BATCH["attention_mask"].sum().item()
    assert ours.evaluate(datasets.Dataset.from_list(ROWS[:4]))["eval_loss"] > 0


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_alpha_zero_is_the_users_trainer(loss_type, tokenizer, tmp_path):
    options = {"loss_type": loss_type, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    ours, own = sft(tmp_path, tokenizer, MOVED.replace(alpha=0.0), **options)
    theirs, expected = sft(tmp_path, tokenizer, None, kind=trl.SFTTrainer, **options)
    losses = [run.train().training_loss for run in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert_same(own, expected)


def test_no_pass_forms_logits(tokenizer, tmp_path):
    trainer, _ = sft(tmp_path, tokenizer, MOVED)
    widths = []
    trainer.model.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[-1]))
    trainer.train()
    whole = widths.count(tiny_models.VOCABULARY)
    assert whole == 1  # the check of the first batch, on one sample
    assert len(widths) > 5


def test_a_class_of_the_users_own_is_mixed_as_well(tokenizer, tmp_path):
    class Mine(AdversarialTrainerMixin, trl.SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    _, gradient, _ = plain(MOVED)
    trainer, gradients = sft(tmp_path, tokenizer, MOVED, kind=Mine)
    trainer.train()
    torch.testing.assert_close(gradients[0], 2 * gradient, rtol=1e-4, atol=1e-6)


def test_what_needs_logits_is_refused_with_the_cure(tokenizer, tmp_path):
    cure = r"^adversarial: expected a method that compares predictions without logits.*AdversarialTrainer on the same"
    with pytest.raises(ValueError, match=cure):
        sft(tmp_path, tokenizer, MOVED.replace(fused_head=False))
    with pytest.raises(ValueError, match=cure), pytest.warns(UserWarning, match="no fused js"):
        sft(tmp_path, tokenizer, MOVED.replace(divergence="js"))
    with (
        pytest.warns(FutureWarning, match="label_smoothing_factor"),
        pytest.raises(ValueError, match=r"^args: expected SF"),
    ):
        sft(tmp_path, tokenizer, AdversarialConfig.smart(), label_smoothing_factor=0.1)
