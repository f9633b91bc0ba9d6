"""Two processes leave the gradients of one: Lightning, Accelerate and Trainers with a loss of their own."""

from pathlib import Path

import pytest
import tiny_models
import torch
from processes import run_ranks
from test_integration_own_trainer import CountingTrainer, FocalTrainer
from tiny_loops import APART, FAR, assert_alike, assert_same, plain_gradients
from tiny_trainer import CLASSIFICATION, MASKED_LM, MOVED, ON_THE_WAY, take_in_order, trainer_of

from alum_kernels.integrations.transformers import adversarial_trainer

pytestmark = pytest.mark.slow

BATCH = tiny_models.classification_batch(8)
BY_HALF = {"alum": FAR, "freelb": ON_THE_WAY, "low": FAR.replace(memory="low")}

PREAMBLE = """
import os
import torch
import tiny_models
from tiny_loops import FAR, watched
from tiny_trainer import CLASSIFICATION, MASKED_LM, MOVED, ON_THE_WAY
BY_HALF = {{"alum": FAR, "freelb": ON_THE_WAY, "low": FAR.replace(memory="low")}}
rank, folder = int(os.environ["RANK"]), {folder!r}
batch = tiny_models.classification_batch(8)
# both micro-batches of a process: 2 of the first 4 samples, then 2 of the others
parts = [{{key: value[at + 2 * rank : at + 2 * rank + 2] for key, value in batch.items()}} for at in (0, 4)]
def save(name, gradient):
    if rank == 0:
        torch.save(gradient, f"{{folder}}/{{name}}.pt")
"""

ACCELERATE = """
from accelerate import Accelerator
from alum_kernels.integrations.accelerate import AcceleratedObjective
for name, config in (("alum", MOVED), ("freelb", ON_THE_WAY), ("low", MOVED.replace(memory="low"))):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == 2
    model = accelerator.prepare(tiny_models.bert().double())
    objective = AcceleratedObjective(model, config, accelerator=accelerator)
    for part in parts:
        with accelerator.accumulate(model):
            objective.backward(part)
    assert objective.optimizer_steps == 1
    save(name, tiny_models.Gradients.of(model).flat())
from accelerate.state import AcceleratorState
AcceleratorState._reset_state()
for name, config in BY_HALF.items():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
    model = accelerator.prepare(tiny_models.bert())
    seen = watched(model.module.bert.encoder.layer[0].attention.self.query)
    objective = AcceleratedObjective(model, config, accelerator=accelerator)
    for part in parts:
        with accelerator.accumulate(model):
            objective.backward(part)
    assert set(seen) == {{torch.bfloat16}}, seen
    save(f"{{name}}-bf16", tiny_models.Gradients.of(model).flat())
"""

LIGHTNING = """
import lightning
from test_integration_lightning import Manual, Module, in_fp16, trainer_of
from torch.utils.data import DataLoader
class OfTwo(Manual):
    accumulated = 2
distributed = dict(strategy="ddp", devices=2, use_distributed_sampler=False)
for name, config in (("alum", MOVED), ("freelb", ON_THE_WAY), ("low", MOVED.replace(memory="low"))):
    module = (Module if name == "alum" else OfTwo)(tiny_models.bert().double(), config)
    accumulated = {{"accumulate_grad_batches": 2}} if name == "alum" else {{}}
    trainer = trainer_of(folder, **distributed, **accumulated)
    trainer.fit(module, DataLoader(parts, batch_size=None))
    assert trainer.world_size == 2
    save(name, module.gradients[0])
for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
    for name, config in BY_HALF.items():
        module = (Module if name == "alum" else OfTwo)(tiny_models.bert(), config)
        seen = watched(module.model.bert.encoder.layer[0].attention.self.query)
        options = {{"precision": "bf16-mixed"}} if precision == "bf16" else {{"plugins": [in_fp16()]}}
        if name == "alum":
            options["accumulate_grad_batches"] = 2
        trainer_of(folder, **distributed, **options).fit(module, DataLoader(parts, batch_size=None))
        assert set(seen) == {{dtype}}, seen
        save(f"{{name}}-{{precision}}", module.gradients[0])
"""

SFT = """
import pytest
from test_integration_sft import llama, sft, words
from tiny_trainer import take_in_order
take_in_order(pytest.MonkeyPatch())
for name, config in (("alum", MOVED), ("freelb", ON_THE_WAY)):
    trainer, gradients = sft(
        folder, words(), config, llama().float(), per_device_train_batch_size=2, gradient_accumulation_steps=2,
        ddp_backend="gloo",
    )
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    assert trainer.objective.linear_head is not None
    save(name, gradients[0])
for name, config in BY_HALF.items():
    trainer, gradients = sft(
        folder, words(), config, llama().float(), per_device_train_batch_size=2, gradient_accumulation_steps=2,
        ddp_backend="gloo", bf16=True,
    )
    seen = watched(trainer.model.model.layers[0].self_attn.q_proj)
    trainer.train()
    assert set(seen) == {{torch.bfloat16}}, seen
    save(f"{{name}}-bf16", gradients[0])
"""

TRAINER = """
from pathlib import Path
from test_integration_own_trainer import CountingTrainer, FocalTrainer
from tiny_trainer import trainer_of
from alum_kernels.integrations.transformers import adversarial_trainer
for name, kind, model, samples in (
    ("focal", FocalTrainer, tiny_models.bert, CLASSIFICATION),
    ("counting", CountingTrainer, tiny_models.bert_masked_lm, MASKED_LM),
):
    for average in (True, False):
        trainer, gradients = trainer_of(
            model().double(), Path(folder), samples, MOVED, adversarial_trainer(kind), per_device_train_batch_size=2,
            gradient_accumulation_steps=2, average_tokens_across_devices=average, ddp_backend="gloo",
        )
        assert trainer.accelerator.num_processes == 2
        trainer.train()
        save(f"{{name}}-{{average}}", gradients[0])
"""


def in_two_processes(code: str, folder: Path) -> None:
    """Runs the code as rank 0 and 1."""
    code = (PREAMBLE + code).format(folder=str(folder))
    # the variables by which torchrun is recognised
    elastic = {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    run_ranks(2, "-c", code, ACCELERATE_USE_CPU="1", **elastic)


@pytest.mark.parametrize("loop", ["accelerate", "lightning"])
def test_two_processes_leave_the_gradients_of_the_plain_loop(loop, tmp_path):
    pytest.importorskip(loop)
    in_two_processes(ACCELERATE if loop == "accelerate" else LIGHTNING, tmp_path)
    for name, config in (("alum", MOVED), ("freelb", ON_THE_WAY), ("low", MOVED.replace(memory="low"))):
        expected = plain_gradients(tiny_models.bert().double(), [BATCH], config)
        assert_same([torch.load(tmp_path / f"{name}.pt")], expected)
    halves = {"bf16": torch.bfloat16, **({"fp16": torch.float16} if loop == "lightning" else {})}
    for precision, dtype in halves.items():
        for name, config in BY_HALF.items():
            expected = plain_gradients(tiny_models.bert(), [BATCH], config, autocast=dtype)
            found = torch.load(tmp_path / f"{name}-{precision}.pt")
            assert_alike([found], expected, APART[dtype], f"{name}, {precision}")


def test_two_processes_fine_tune_as_one(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from test_integration_sft import llama, sft, words

    in_two_processes(SFT, tmp_path)
    take_in_order(monkeypatch)
    for kind, dtype, methods in (
        ("", None, {"alum": MOVED, "freelb": ON_THE_WAY}),
        ("-bf16", torch.bfloat16, BY_HALF),
    ):
        for name, config in methods.items():
            trainer, gradients = sft(tmp_path, words(), config, llama().float(), bf16=dtype is not None)
            trainer.train()
            assert_alike([torch.load(tmp_path / f"{name}{kind}.pt")], gradients, APART[dtype], name + kind)


def test_two_processes_leave_the_gradients_of_a_loss_of_ones_own(tmp_path):
    in_two_processes(TRAINER, tmp_path)
    for name, kind, model, samples in (
        ("focal", FocalTrainer, tiny_models.bert, CLASSIFICATION),
        ("counting", CountingTrainer, tiny_models.bert_masked_lm, MASKED_LM),
    ):
        trainer, gradients = trainer_of(model().double(), tmp_path, samples, MOVED, adversarial_trainer(kind))
        trainer.train()
        found = {average: torch.load(tmp_path / f"{name}-{average}.pt") for average in (True, False)}
        assert_same([found[True]], gradients)
        if name == "focal":  # otherwise each process takes the mean over its own labels
            assert_same([found[False]], gradients)
