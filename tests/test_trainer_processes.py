"""``AdversarialTrainer`` over processes, and where its extra is not installed."""

import subprocess
import sys

import tiny_models
import torch
from processes import group_of_one, run_ranks
from tiny_loops import APART, assert_alike
from tiny_trainer import (
    CLASSIFICATION,
    IN_BF16,
    IN_PARALLEL,
    LINEAR,
    MASKED_LM,
    MOVED,
    NORMALISED,
    ON_THE_WAY,
    model_and_batch,
    trainer_of,
)
from torch import nn

from alum_kernels import AdversarialObjective


def test_a_model_already_in_distributed_data_parallel_is_seen_through(tmp_path):
    plain, expected = trainer_of(tiny_models.bert(), tmp_path, CLASSIFICATION)
    plain.train()
    with group_of_one(tmp_path):
        wrapped = nn.parallel.DistributedDataParallel(tiny_models.bert())
        trainer, gradients = trainer_of(wrapped, tmp_path, CLASSIFICATION, remove_unused_columns=False)
        trainer.train()
    torch.testing.assert_close(gradients[0], expected[0], rtol=1e-5, atol=1e-7)


PROCESS = """
from pathlib import Path
import torch
import tiny_trainer as t
from tiny_loops import watched
for task, model, samples, config, average in (
    ("classification", t.tiny_models.bert, t.CLASSIFICATION, t.MOVED, True),
    ("classification", t.tiny_models.bert, t.CLASSIFICATION, t.MOVED, False),
    ("freelb", t.tiny_models.bert, t.CLASSIFICATION, t.ON_THE_WAY, True),
    ("sift", t.tiny_models.bert, t.CLASSIFICATION, t.NORMALISED, True),
    ("llr", t.tiny_models.bert, t.CLASSIFICATION, t.LINEAR, True),
    ("masked_lm", t.tiny_models.bert_masked_lm, t.MASKED_LM, t.MOVED, True),
):
    trainer, gradients = t.trainer_of(
        model().double(), Path({folder!r}), samples, config, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, average_tokens_across_devices=average, ddp_backend="gloo",
    )
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    assert (trainer.objective.linear_head is not None) == (task == "masked_lm")
    if trainer.accelerator.process_index == 0:
        torch.save(gradients[0], Path({folder!r}) / f"{{task}}-{{average}}.pt")
for name, (model, samples, config) in t.IN_BF16.items():
    trainer, gradients = t.trainer_of(
        model(), Path({folder!r}), samples, config, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, ddp_backend="gloo", bf16=True,
    )
    seen = watched(trainer.model.bert.encoder.layer[0].attention.self.query)
    trainer.train()
    assert set(seen) == {{torch.bfloat16}}, seen
    if trainer.accelerator.process_index == 0:
        torch.save(gradients[0], Path({folder!r}) / f"bf16-{{name}}.pt")
"""


def test_two_processes_give_the_gradient_of_one(tmp_path):
    """Whether the Trainer counts items over all processes or in each; with and without logits."""
    expected = {}
    for task, model, samples, config in (
        ("classification", tiny_models.bert, CLASSIFICATION, MOVED),
        ("freelb", tiny_models.bert, CLASSIFICATION, ON_THE_WAY),
        ("sift", tiny_models.bert, CLASSIFICATION, NORMALISED),
        ("llr", tiny_models.bert, CLASSIFICATION, LINEAR),
        ("masked_lm", tiny_models.bert_masked_lm, MASKED_LM, MOVED),
    ):
        trainer, gradients = trainer_of(model().double(), tmp_path, samples, config)
        trainer.train()
        expected[task] = gradients[0]
    run_ranks(2, "-c", PROCESS.format(folder=str(tmp_path)), ACCELERATE_USE_CPU="1")
    ran = (
        ("classification", True),
        ("classification", False),
        ("freelb", True),
        ("sift", True),
        ("llr", True),
        ("masked_lm", True),
    )
    for task, average in ran:
        gradient = torch.load(tmp_path / f"{task}-{average}.pt")
        torch.testing.assert_close(gradient, expected[task], rtol=1e-8, atol=1e-12)
    for name, (model, samples, config) in IN_BF16.items():
        trainer, gradients = trainer_of(model(), tmp_path, samples, config, bf16=True)
        trainer.train()
        assert_alike([torch.load(tmp_path / f"bf16-{name}.pt")], gradients, APART[torch.bfloat16], name)


PARALLEL = """
import torch
import tiny_models
import tiny_trainer as t
from processes import join_group
from alum_kernels import AdversarialObjective
rank, _ = join_group("{folder}")
for name, (task, config) in t.IN_PARALLEL.items():
    for static in (False, True):
        inner, batch = t.model_and_batch(task)
        own = {{name: values[4 * rank : 4 * rank + 4] for name, values in batch.items()}}
        model = torch.nn.parallel.DistributedDataParallel(inner, static_graph=static)
        objective = AdversarialObjective(model, config)
        for _ in range(2):  # a static graph is recorded in the first step
            model.zero_grad()
            try:
                output = objective.forward(
                    own, seed=torch.tensor([3]), sample_offset=4 * rank, backward=torch.Tensor.backward
                )
            except ValueError as error:
                assert static and config.trains_in_parts and "without static_graph" in str(error), error
                continue
            output.loss.backward()
            if rank == 0:
                torch.save(tiny_models.Gradients.of(model.module).flat(), f"{folder}/{{name}}-{{static}}.pt")
"""


def test_both_kinds_of_parallel_graph_give_the_gradient_of_one_process(tmp_path):
    run_ranks(2, "-c", PARALLEL.format(folder=str(tmp_path)))
    for name, (task, config) in IN_PARALLEL.items():
        model, batch = model_and_batch(task)
        objective = AdversarialObjective(model, config)
        objective.forward(batch, seed=torch.tensor([3]), backward=torch.Tensor.backward).loss.backward()
        expected = tiny_models.Gradients.of(model).flat()
        for static in (False, True):
            if not (static and config.trains_in_parts):
                found = torch.load(tmp_path / f"{name}-{static}.pt")
                torch.testing.assert_close(
                    found, expected, rtol=1e-8, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
                )


WITHOUT = """
import sys
for missing in ("accelerate", "transformers"):
    sys.modules[missing] = None
    try:
        import alum_kernels.integrations.transformers
    except ImportError as error:
        print(missing, error)
    del sys.modules[missing]
"""


def test_without_the_extra_importing_names_it():
    run = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["accelerate", "transformers"]
    assert all("pip install 'alum-kernels[transformers]'" in line for line in lines)
