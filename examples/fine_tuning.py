"""A pretrained model, fine-tuned on a task with one method and seed, and judged by the task's metrics."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from alum_kernels import AdversarialConfig
from alum_kernels.training.batches import Batch
from alum_kernels.training.methods import adversarial_objective
from examples.encoding import NOT_COUNTED, DevSet
from examples.glue_metrics import METRICS
from examples.glue_tasks import REGRESSION, TAGGING, TaggedSentences, TaskData
from examples.training import Run, train

OUTSIDE = "O"


@dataclass(frozen=True)
class Start:
    """What every method of a comparison starts from: a model's name or path, learning rate and device."""

    source: str
    learning_rate: float
    device: torch.device


def new_model(data: TaskData, start: Start, seed: int) -> nn.Module:
    """The pretrained model with a head for the task, drawn from the seed."""
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    torch.manual_seed(seed)
    if data.task.kind == TAGGING:
        model = AutoModelForTokenClassification.from_pretrained(start.source, num_labels=len(data.classes))
    elif data.task.kind == REGRESSION:
        model = AutoModelForSequenceClassification.from_pretrained(
            start.source, num_labels=1, problem_type="regression"
        )
    else:
        model = AutoModelForSequenceClassification.from_pretrained(start.source, num_labels=len(data.classes))
    return model.to(start.device)


def check_methods(data: TaskData, configs: Sequence[AdversarialConfig | None], start: Start) -> None:
    """Raises MethodError where a method has no meaning for this task, before anything is trained."""
    model = new_model(data, start, seed=0)
    for config in configs:
        objective = adversarial_objective(model, config)
        if objective is not None:
            objective.remove_hooks()


def fine_tune(
    data: TaskData,
    batches: Sequence[Batch],
    run: Run,
    config: AdversarialConfig | None,
    start: Start,
    *,
    seed: int,
    keep_bar: bool = True,
) -> nn.Module:
    """Train a new model on the batches; the seed draws its head, dropout and the adversary's noise.

    Raises:
        MethodError: the method has no meaning for this task.
    """
    model = new_model(data, start, seed)
    torch.manual_seed(seed)
    seeded = None if config is None else config.replace(seed=seed)
    train(model, batches, run, seeded, learning_rate=start.learning_rate, device=start.device, keep_bar=keep_bar)
    return model


def evaluate(model: nn.Module, data: TaskData, dev: DevSet) -> dict[str, float]:
    """The task's metrics on its development examples, by name; all examples count, truncated or not."""
    progress = tqdm(dev.batches, desc="  development examples", unit="batch", leave=False, dynamic_ncols=True)
    outputs = [_logits(model, batch) for batch in progress]
    if isinstance(data.dev, TaggedSentences):
        expected = [[data.classes[tag] for tag in tags] for tags in data.dev.tags]
        predicted = _tags(outputs, data, dev)
    elif data.task.kind == REGRESSION:
        predicted = torch.cat([logits.squeeze(-1) for logits in outputs]).tolist()
        expected = data.dev.labels
    else:
        predicted = torch.cat([logits.argmax(-1) for logits in outputs]).tolist()
        expected = data.dev.labels
    return {name: METRICS[name](predicted, expected) for name in data.task.metrics}


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits.float().cpu()


def _tags(outputs: Sequence[Tensor], data: TaskData, dev: DevSet) -> list[list[str]]:
    """Predicted tags of every word; a word that was cut off is predicted to be outside of entities."""
    sentences: list[list[str]] = []
    for logits, batch, words in zip(outputs, dev.batches, dev.words, strict=True):
        for row, counted in enumerate(words):
            tags = [OUTSIDE] * len(data.dev.tags[len(sentences)])
            classes = logits[row, batch["labels"][row] != NOT_COUNTED].argmax(-1).tolist()
            for word, predicted in zip(counted, classes, strict=True):
                tags[word] = data.classes[predicted]
            sentences.append(tags)
    return sentences
