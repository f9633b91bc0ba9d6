"""Transformers of two layers with random weights, and batches for them: every kind of model the layer promises."""

from dataclasses import dataclass

import torch
import transformers
from tiny_families import FAMILIES, FAMILIES_OF, HEAD_OF, LABELS, PADDING, TASKS, VOCABULARY
from torch import Tensor, nn

__all__ = ["FAMILIES", "FAMILIES_OF", "HEAD_OF", "LABELS", "PADDING", "VOCABULARY"]

_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
    "pad_token_id": PADDING,
    "initializer_range": 0.2,
}


def _dropout(names: tuple[str, ...], dropout: float) -> dict[str, float]:
    return dict.fromkeys(names, dropout)


_BERT_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def bert(dropout: float = 0.0, *, labels: int = LABELS, seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.BertConfig(**_BERT, num_labels=labels, **_dropout(_BERT_DROPOUT, dropout), **options)
    return transformers.BertForSequenceClassification(config).train()


def bert_masked_lm(dropout: float = 0.0, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.BertConfig(**_BERT, **_dropout(_BERT_DROPOUT, dropout))
    return transformers.BertForMaskedLM(config).train()


def roberta(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        **_BERT, bos_token_id=0, eos_token_id=2, num_labels=LABELS, **_dropout(_BERT_DROPOUT, dropout)
    )
    return transformers.RobertaForSequenceClassification(config).train()


def gpt2(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=24,
        initializer_range=0.2,
        pad_token_id=PADDING,
        bos_token_id=0,
        eos_token_id=2,
        num_labels=LABELS,
        **_dropout(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
    )
    return transformers.GPT2ForSequenceClassification(config).train()


def t5(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        pad_token_id=PADDING,
        eos_token_id=2,
        decoder_start_token_id=0,
        num_labels=LABELS,
        dropout_rate=dropout,
    )
    return transformers.T5ForSequenceClassification(config).train()


def bart(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=24,
        init_std=0.2,
        pad_token_id=PADDING,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        num_labels=LABELS,
        **_dropout(("dropout", "attention_dropout", "activation_dropout", "classifier_dropout"), dropout),
    )
    return transformers.BartForSequenceClassification(config).train()


CLASSIFIERS = {"bert": bert, "roberta": roberta, "gpt2": gpt2, "t5": t5, "bart": bart}


def tokens(samples: int = 4, length: int = 7, *, seed: int = 0) -> dict[str, Tensor]:
    """Padded sequences of different lengths, each ending in the token 2 that T5 and BART classify at."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (samples, length), generator=generator)
    lengths = length - torch.arange(samples) % 3
    position = torch.arange(length)
    attention_mask = (position < lengths[:, None]).long()
    input_ids = torch.where(position == lengths[:, None] - 1, 2, input_ids)
    return {"input_ids": torch.where(attention_mask == 1, input_ids, PADDING), "attention_mask": attention_mask}


def classification_batch(samples: int = 4, length: int = 7, *, seed: int = 0) -> dict[str, Tensor]:
    return {**tokens(samples, length, seed=seed), "labels": torch.arange(samples) % LABELS}


def regression_batch(samples: int = 4, length: int = 7) -> dict[str, Tensor]:
    return {**tokens(samples, length), "labels": torch.linspace(-1, 1, samples)}


def masked_lm_batch(samples: int = 4, length: int = 7, *, seed: int = 0) -> dict[str, Tensor]:
    """Sample b has b % 3 + 1 labelled positions."""
    batch = tokens(samples, length, seed=seed)
    labelled = torch.arange(length) < (torch.arange(samples) % 3 + 1)[:, None]
    return {**batch, "labels": torch.where(labelled, batch["input_ids"], -100)}


class BagOfEmbeddings(nn.Module):
    """Embeddings, and a body that runs on them alone, so that a step can be written out by hand."""

    def __init__(self, *, labels: int = LABELS, hidden: int = 12) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.inner, self.out = nn.Linear(hidden, hidden), nn.Linear(hidden, labels)

    def body(self, embeds: Tensor, attention_mask: Tensor) -> Tensor:
        weight = attention_mask.unsqueeze(-1).to(embeds.dtype)
        pooled = (torch.tanh(self.inner(embeds)) * weight).sum(1) / weight.sum(1)
        return self.out(pooled)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.body(self.embed(input_ids), attention_mask)


@dataclass
class Gradients:
    """Gradients of a model's parameters by name, None where there is none."""

    values: dict[str, Tensor | None]

    @classmethod
    def of(cls, model: nn.Module) -> "Gradients":
        return cls({n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()})

    def flat(self) -> Tensor:
        return torch.cat([grad.flatten() for grad in self.values.values() if grad is not None])


_TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "pad_token_id": PADDING,
    "initializer_range": 0.2,
}
_IDS = {"bos_token_id": 0, "eos_token_id": 2}
_SPECIAL = {**_IDS, "cls_token_id": 0, "sep_token_id": 2}

MASKED_LMS = {
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig, _TINY),
    "roberta": (transformers.RobertaForMaskedLM, transformers.RobertaConfig, {**_TINY, **_IDS}),
    "albert": (transformers.AlbertForMaskedLM, transformers.AlbertConfig, {**_TINY, "embedding_size": 8, **_IDS}),
    "electra": (transformers.ElectraForMaskedLM, transformers.ElectraConfig, {**_TINY, "embedding_size": 8}),
    "deberta-v2": (transformers.DebertaV2ForMaskedLM, transformers.DebertaV2Config, _TINY),
    "distilbert": (
        transformers.DistilBertForMaskedLM,
        transformers.DistilBertConfig,
        {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24, "pad_token_id": PADDING},
    ),
    "modernbert": (transformers.ModernBertForMaskedLM, transformers.ModernBertConfig, {**_TINY, **_SPECIAL}),
}
CAUSAL_LMS = {
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24, **_IDS},
    ),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {**_TINY, **_IDS}),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, {**_TINY, "num_key_value_heads": 2, **_IDS}),
    "gemma2": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config,
        {**_TINY, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0, **_IDS},
    ),
    "cohere": (transformers.CohereForCausalLM, transformers.CohereConfig, {**_TINY, "logit_scale": 0.25, **_IDS}),
    "granite": (transformers.GraniteForCausalLM, transformers.GraniteConfig, {**_TINY, "logits_scaling": 4.0, **_IDS}),
}
LANGUAGE_MODELS = {**MASKED_LMS, **CAUSAL_LMS}


def language_model(name: str, *, seed: int = 0) -> nn.Module:
    """A masked or causal language model without dropout."""
    torch.manual_seed(seed)
    kind, config, options = LANGUAGE_MODELS[name]
    model = kind(config(**options)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def bert_pretraining(*, seed: int = 0) -> nn.Module:
    """BERT with both of its pre-training heads, without dropout."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(**_BERT, **_dropout(_BERT_DROPOUT, 0.0))
    return transformers.BertForPreTraining(config).train()


def pretraining_batch(samples: int = 4, length: int = 7) -> dict[str, Tensor]:
    return {**masked_lm_batch(samples, length), "next_sentence_label": torch.arange(samples) % 2}


def make(
    family: str, task: str, dropout: float = 0.0, dtype: torch.dtype | None = None, *, seed: int = 0, **options
) -> nn.Module:
    """A model of ``FAMILIES_OF[task]`` in training mode, with one dropout everywhere; ``options`` are its config's."""
    chosen = FAMILIES[family]
    kind = getattr(transformers, chosen.classes.get(task, chosen.prefix + TASKS[task]))
    options = {"num_labels": {"regression": 1, "spans": 2}.get(task, LABELS), **chosen.options, **options}
    config = kind.config_class(**options)
    for name, value in config.to_dict().items():
        if "drop" in name and "layerdrop" not in name and isinstance(value, float):
            setattr(config, name, dropout)
    torch.manual_seed(seed)
    model = kind(config).to(torch.get_default_dtype() if dtype is None else dtype).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # some heads have one of which the configuration knows nothing
            module.p = dropout
    return model


def batch(task: str, samples: int = 4, length: int = 7, *, seed: int = 0) -> dict[str, Tensor]:
    """A batch of a task with padding, and with ignored labels where the task may have some."""
    builders = {
        "classification": classification_batch,
        "choice": choice_batch,
        "token_labels": token_labels_batch,
        "spans": spans_batch,
        "masked_lm": masked_lm_batch,
        "causal_lm": causal_lm_batch,
        "seq2seq": seq2seq_batch,
    }
    return regression_batch(samples, length) if task == "regression" else builders[task](samples, length, seed=seed)


def choice_batch(samples: int = 4, length: int = 7, *, choices: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """(samples, choices, length): the choices of a sample have different lengths."""
    flat = tokens(samples * choices, length, seed=seed)
    by_sample = {name: value.unflatten(0, (samples, choices)) for name, value in flat.items()}
    return {**by_sample, "labels": torch.arange(samples) % choices}


def token_labels_batch(samples: int = 4, length: int = 7, *, seed: int = 0) -> dict[str, Tensor]:
    """Every token but the first and the last two of a sample has a label."""
    inputs = tokens(samples, length, seed=seed)
    position = torch.arange(length)
    labelled = (position > 0) & (position < inputs["attention_mask"].sum(1, keepdim=True) - 2)
    return {**inputs, "labels": torch.where(labelled, inputs["input_ids"] % LABELS, -100)}


def spans_batch(samples: int = 4, length: int = 7, *, seed: int = 0) -> dict[str, Tensor]:
    """The second sample has no answer (position 0), the answer of the third one lies outside of its sequence."""
    start = torch.arange(samples) % 3
    start[1:2], start[2:3] = 0, 1000
    end = start + torch.arange(samples) % 2
    end[1:2] = 0
    return {**tokens(samples, length, seed=seed), "start_positions": start, "end_positions": end}


def causal_lm_batch(samples: int = 4, length: int = 7, *, seed: int = 0) -> dict[str, Tensor]:
    """The first token of a sample and its padding have no label."""
    inputs = tokens(samples, length, seed=seed)
    labels = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    labels[:, 0] = -100
    return {**inputs, "labels": labels}


def seq2seq_batch(samples: int = 4, length: int = 7, *, targets: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Targets of their own lengths, padded with ignored labels."""
    target = tokens(samples, targets, seed=seed + 1)
    order = torch.arange(samples).flip(0)
    labels = torch.where(target["attention_mask"] == 1, target["input_ids"], -100)[order]
    return {**tokens(samples, length, seed=seed), "labels": labels}


def with_more_padding(batch: dict[str, Tensor], more: int = 2) -> dict[str, Tensor]:
    """The same batch with ``more`` positions of padding at the end of every sequence."""
    values = {"input_ids": PADDING, "attention_mask": 0, "labels": -100}
    return {
        name: nn.functional.pad(value, (0, more), value=values[name]) if name in values and value.dim() > 1 else value
        for name, value in batch.items()
    }
