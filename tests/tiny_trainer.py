"""Trainers of the tiny models that keep the gradients they compute."""

from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_loops import FAR
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from alum_kernels import AdversarialConfig
from alum_kernels.integrations.transformers import AdversarialTrainer

ON_THE_WAY = AdversarialConfig.freelb(std=0.1, step_size=0.2, epsilon=0.3)
LINEAR = AdversarialConfig.llr()
MOVED = AdversarialConfig(alpha=5.0, std=1e-2, step_size=2e-2, epsilon=2e-2, normalize="linf", steps=2)
NORMALISED = AdversarialConfig.sift(step_size=0.1)
IN_PARALLEL = {
    "smart": ("classification", MOVED),
    "pgd": ("classification", AdversarialConfig.pgd(std=0.1, step_size=0.2, epsilon=0.3)),
    "llr": ("classification", AdversarialConfig.llr()),
    "freelb": ("classification", ON_THE_WAY),
    "masked_lm": ("masked_lm", MOVED),
    "low memory": ("classification", MOVED.replace(memory="low")),
    "low memory, masked_lm": ("masked_lm", MOVED.replace(memory="low")),
    "depth": ("classification", MOVED.replace(ascent_depth=1)),
}
"""Methods under ``DistributedDataParallel``, each on one task."""


def model_and_batch(task: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model in float64 and eight samples with as many labels in each half."""
    if task == "classification":
        return tiny_models.bert().double(), tiny_models.classification_batch(8)
    batch = tiny_models.masked_lm_batch(8)
    batch["labels"] = torch.where(torch.arange(7) < 2, batch["input_ids"], -100)
    return tiny_models.bert_masked_lm().double(), batch


def samples_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{key: value[index] for key, value in batch.items()} for index in range(len(batch["labels"]))]


CLASSIFICATION = samples_of(tiny_models.classification_batch(8))
REGRESSION = samples_of(tiny_models.regression_batch(8))
MASKED_LM = samples_of(tiny_models.masked_lm_batch(8))


IN_BF16 = {
    "alum": (tiny_models.bert, CLASSIFICATION, FAR),
    "freelb": (tiny_models.bert, CLASSIFICATION, ON_THE_WAY),
    "masked_lm": (tiny_models.bert_masked_lm, MASKED_LM, FAR),
}
"""What a Trainer trains in bf16 over processes: model, samples and method."""

ONE_STEP = {
    "max_steps": 1,
    "per_device_train_batch_size": 8,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
"""Arguments of a training that is one step of plain SGD, unclipped."""


def take_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers take their samples as they come."""
    sampler = torch.utils.data.SequentialSampler
    monkeypatch.setattr(Trainer, "_get_train_sampler", lambda self, *_: sampler(self.train_dataset))


class GradientLog(TrainerCallback):
    """Gradients as the optimizer gets them, flat, one entry a step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(tiny_models.Gradients.of(model).flat())


def trainer_of(
    model: nn.Module,
    folder: Path,
    samples: list,
    config: AdversarialConfig = MOVED,
    kind: type[Trainer] = AdversarialTrainer,
    **options,
):
    """A trainer of a class on ``samples``, and the gradients it will compute."""
    arguments = {**ONE_STEP, "dataloader_pin_memory": False, "label_names": ["labels"]}
    keywords = {key: options.pop(key) for key in ("compute_loss_func", "eval_dataset", "model_init") if key in options}
    log = GradientLog()
    trainer = kind(
        model=model,
        args=TrainingArguments(str(folder), **{**arguments, **options}),
        train_dataset=samples,
        callbacks=[log],
        adversarial=config,
        **keywords,
    )
    return trainer, log.steps
