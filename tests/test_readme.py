"""The code of the README runs as it stands, given the model and data that it assumes."""

import re
from pathlib import Path

import pytest
import torch

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.adversarial.config import PRESETS

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_is_an_example_of_each_use():
    words = (
        "noise_init",
        "linear_symmetric_kl",
        "AdversarialObjective",
        "AdversarialTrainer",
        "adversarial_trainer",
        "ProgressiveMaskingCollator",
        "capture",
    )
    assert len(BLOCKS) == len(words)
    for word, block in zip(words, BLOCKS, strict=True):
        assert word in block


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"^[A-Z_]{8,}$|TODO|TBD", README, re.MULTILINE)


def test_every_preset_is_in_the_table():
    assert set(PRESETS) <= set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| `.*", README, re.MULTILINE))))


def test_kernel_example():
    names: dict = {}
    exec(BLOCKS[0], names)
    assert names["inner"].detach() > 0
    assert names["embeds"].grad.abs().sum() > 0
    assert (names["perturbed"] - names["embeds"]).abs().max() <= 1.001e-2


def test_linear_head_example():
    names: dict = {}
    exec(BLOCKS[1], names)
    assert names["hidden"].grad.abs().sum() > 0
    assert names["head"].weight.grad.abs().sum() > 0


@pytest.fixture
def classifier():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, num_labels=3, **shape))


def test_loop_example(classifier):
    batch = {"input_ids": torch.randint(1, 50, (4, 6)), "labels": torch.tensor([0, 1, 2, 1])}
    before = classifier.classifier.weight.detach().clone()
    names = {"model": classifier, "loader": [batch, batch], "optimizer": torch.optim.SGD(classifier.parameters(), 0.1)}
    exec(BLOCKS[2], names)
    assert not torch.equal(before, classifier.classifier.weight)


@pytest.mark.parametrize("block", [3, 4])
def test_trainer_examples(block, classifier, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    rows = [{"input_ids": [2, 3, 4 + index], "labels": index % 3} for index in range(8)]
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, logging_steps=1, report_to=[], use_cpu=True
    )
    names = {"model": classifier, "args": args, "train": rows, "TheirTrainer": transformers.Trainer}
    exec(BLOCKS[block], names)
    if block == 4:
        names["trainer"].train()
    logged = [entry for entry in names["trainer"].state.log_history if "loss" in entry]
    assert len(logged) == 2
    assert all(any("ascent_gain" in name for name in entry) for entry in logged)


def test_pre_training_example():
    transformers = pytest.importorskip("transformers")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    tokenizer = transformers.BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)})
    names = {"documents": [["a b c", "d e"] * 50, ["f g h", "a h"] * 50], "tokenizer": tokenizer}
    exec(BLOCKS[5], names)
    state = transformers.TrainerState(global_step=9, max_steps=10)
    names["progress"].on_step_end(None, state, None)
    labels = names["collate"](list(names["pairs"]))["labels"]
    assert names["collate"].share == 0.25
    assert 0 < labels.ne(-100).float().mean() < 0.5


def test_capture_example(classifier):
    batch = {"input_ids": torch.randint(1, 50, (4, 6)), "labels": torch.tensor([0, 1, 2, 1])}
    before = classifier.classifier.weight.detach().clone()
    adversarial = AdversarialObjective(classifier, AdversarialConfig.alum_finetuning())
    names = {"torch": torch, "model": classifier, "adversarial": adversarial, "batch": batch, "loader": [batch, batch]}
    with pytest.warns(UserWarning, match="CUDA graphs need a GPU"):
        exec(BLOCKS[6], names)
    assert not torch.equal(before, classifier.classifier.weight)
