"""Families of transformers made small, as data: what their classes are called, and their configurations."""

from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 48
PADDING = 1
LABELS = 3

TASKS = {
    "classification": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    "choice": "ForMultipleChoice",
    "token_labels": "ForTokenClassification",
    "spans": "ForQuestionAnswering",
    "masked_lm": "ForMaskedLM",
    "causal_lm": "ForCausalLM",
    "seq2seq": "ForConditionalGeneration",
}
"""How the names of the classes for each task end."""

HEAD_OF = {
    "classification": "classification",
    "regression": "regression",
    "choice": "multiple_choice",
    "token_labels": "token_classification",
    "spans": "question_answering",
    "masked_lm": "masked_lm",
    "causal_lm": "causal_lm",
    "seq2seq": "seq2seq_lm",
}

_ENCODER = ("classification", "regression", "choice", "token_labels", "spans", "masked_lm")
_DECODER = ("classification", "regression", "token_labels", "spans", "causal_lm")
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": PADDING, "bos_token_id": 0, "eos_token_id": 2}
_BODY = {
    **_IDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
    "initializer_range": 0.2,
}
_GROUPED = {**_BODY, "num_key_value_heads": 1, "head_dim": 8}


@dataclass(frozen=True)
class Family:
    """One architecture: its classes are ``prefix`` and a task's suffix, or another where ``classes`` has it."""

    prefix: str
    options: dict[str, Any]
    tasks: tuple[str, ...] = _ENCODER
    classes: dict[str, str] = field(default_factory=dict)


FAMILIES = {
    "bert": Family("Bert", _BODY),
    "roberta": Family("Roberta", _BODY),
    "albert": Family("Albert", {**_BODY, "embedding_size": 8}),
    "electra": Family("Electra", {**_BODY, "embedding_size": 8}),
    "deberta-v2": Family(
        "DebertaV2",
        {**_BODY, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    ),
    "distilbert": Family(
        "DistilBert",
        {
            **_IDS,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 24,
            "max_position_embeddings": 24,
            "initializer_range": 0.2,
        },
    ),
    "modernbert": Family("ModernBert", {**_BODY, "cls_token_id": 0, "sep_token_id": 2, "local_attention": 4}),
    "xlm-roberta": Family("XLMRoberta", _BODY),
    "mpnet": Family("MPNet", _BODY),
    "gpt2": Family(
        "GPT2",
        {**_IDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24, "initializer_range": 0.2},
        _DECODER,
        {"causal_lm": "GPT2LMHeadModel"},
    ),
    "opt": Family(
        "OPT",
        {
            **_IDS,
            "hidden_size": 16,
            "word_embed_proj_dim": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 24,
            "max_position_embeddings": 24,
            "init_std": 0.2,
        },
        tuple(task for task in _DECODER if task != "token_labels"),
    ),
    "llama": Family("Llama", _GROUPED, _DECODER),
    "qwen2": Family("Qwen2", _GROUPED, _DECODER),
    "qwen3": Family("Qwen3", _GROUPED, _DECODER),
    "gemma": Family("Gemma", _GROUPED, tuple(task for task in _DECODER if task != "spans")),
    "gemma2": Family(
        "Gemma2",
        {**_GROUPED, "sliding_window": 6, "final_logit_softcapping": 2.0},
        tuple(task for task in _DECODER if task != "spans"),
    ),
    "t5": Family(
        "T5",
        {
            **_IDS,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        ("classification", "regression", "token_labels", "spans", "seq2seq"),
    ),
    "bart": Family(
        "Bart",
        {
            **_IDS,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 24,
            "init_std": 0.2,
            "decoder_start_token_id": 2,
        },
        ("classification", "regression", "spans", "seq2seq"),
    ),
}
FAMILIES_OF = {task: tuple(name for name, family in FAMILIES.items() if task in family.tasks) for task in TASKS}
