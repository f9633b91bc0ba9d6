"""``ProgressiveMaskingCollator`` in a Trainer: the share moves with the steps, and a resumed run is the whole one."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from word_samples import new_tokenizer, samples_of

from alum_kernels.integrations.masking import ALUM_SHARES, MaskingProgressCallback, ProgressiveMaskingCollator


@pytest.fixture(scope="module")
def tokenizer():
    return new_tokenizer()


class Recording(ProgressiveMaskingCollator):
    """One that notes the sequences and the share of every batch."""

    def torch_mask_tokens(self, inputs, special_tokens_mask=None, offset_mapping=None):
        rows = inputs.tolist()
        masked = super().torch_mask_tokens(inputs, special_tokens_mask, offset_mapping)
        self.__dict__.setdefault("batches", []).append((rows, self.mlm_probability))
        return masked


def trainer_of(tokenizer, folder, seed=None, shares=ALUM_SHARES, **options):
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    torch.manual_seed(0)
    collate = Recording(tokenizer, shares, seed=seed)
    arguments = {
        "max_steps": 20,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 10,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    trainer = transformers.Trainer(
        transformers.BertForPreTraining(transformers.BertConfig(vocab_size=len(tokenizer), **shape)),
        transformers.TrainingArguments(str(folder), **{**arguments, **options}),
        data_collator=collate,
        train_dataset=samples_of(tokenizer, 26, 6),
        callbacks=[MaskingProgressCallback(collate)],
    )
    return trainer, collate


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_moves_the_share(tokenizer, tmp_path, accumulation):
    """Every fifth of the steps has its share, begun by one micro-batch late."""
    # 13 micro-batches an epoch: the accumulation does not divide them
    trainer, collate = trainer_of(
        tokenizer, tmp_path, gradient_accumulation_steps=accumulation, save_strategy="no", max_steps=20
    )
    trainer.train()
    first_of_step = [0]
    while len(first_of_step) <= 20:
        left = 13 - first_of_step[-1] % 13
        first_of_step.append(first_of_step[-1] + min(accumulation, left))
    shares = [share for _, share in collate.batches]
    for fifth, share in enumerate(ALUM_SHARES):
        start, stop = first_of_step[4 * fifth], first_of_step[4 * fifth + 4]
        assert shares[start] == (share if start % 13 == 0 else ALUM_SHARES[max(fifth - 1, 0)])
        assert set(shares[start + 1 : stop]) == {share}
    assert collate.state_dict() == {"step": 20, "total": 20, "epoch": 20 // -(-13 // accumulation)}


def fed(trainer) -> list[tuple]:
    """What the model gets, batch for batch, once the trainer trains."""
    batches: list[tuple] = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, batch: batches.append((batch["input_ids"].tolist(), batch["labels"].tolist())),
        with_kwargs=True,
    )
    return batches


@pytest.mark.parametrize("checkpoint", [10, 13])
def test_a_resumed_run_has_the_shares_of_an_uninterrupted_one(tokenizer, tmp_path, checkpoint):
    """Step 10 is in the middle of a fifth and of an epoch, step 13 at the end of an epoch."""
    whole, expected = trainer_of(tokenizer, tmp_path / "whole", save_steps=checkpoint)
    whole.train()
    resumed, found = trainer_of(tokenizer, tmp_path / "resumed", save_steps=checkpoint)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{checkpoint}"))
    rest = expected.batches[checkpoint:]
    assert found.batches == rest
    assert {share for _, share in rest} == set(ALUM_SHARES[checkpoint // 4 :])


@pytest.mark.parametrize(
    ("seed", "checkpoint", "workers"), [(5, 10, 0), (5, 10, 2), (5, 13, 0), (None, 13, 0), (None, 13, 2)]
)
def test_a_resumed_run_has_the_masks_of_an_uninterrupted_one(tokenizer, tmp_path, seed, checkpoint, workers):
    """With a seed from any step; without one from the beginning of an epoch."""
    # when workers see a new share is left to chance, so theirs is constant
    options = {"save_steps": checkpoint, "dataloader_num_workers": workers}
    options["shares"] = (0.15,) if workers else ALUM_SHARES
    whole, _ = trainer_of(tokenizer, tmp_path / "whole", seed, **options)
    expected = fed(whole)
    whole.train()
    resumed, _ = trainer_of(tokenizer, tmp_path / "resumed", seed, **options)
    found = fed(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{checkpoint}"))
    assert found == expected[checkpoint:]
    assert len(found) == 20 - checkpoint


@pytest.mark.parametrize("workers", [0, 1])
def test_epochs_differ_with_a_seed(tokenizer, tmp_path, workers):
    """Also where every epoch has fresh workers and the same batches."""
    options = {"save_strategy": "no", "max_steps": 26, "dataloader_num_workers": workers}
    trainer, _ = trainer_of(tokenizer, tmp_path, 5, shares=(0.15,), **options)
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(trainer.train_dataset)
    batches = fed(trainer)
    trainer.train()
    assert len(batches) == 26
    assert all(first != second for first, second in zip(batches[:13], batches[13:], strict=True))
