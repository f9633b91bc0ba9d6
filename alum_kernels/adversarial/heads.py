"""What a model predicts, and how its clean and perturbed predictions are compared."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from alum_kernels.adversarial.labels import IGNORED_LABEL, without_labels
from alum_kernels.adversarial.model_state import unwrap
from alum_kernels.adversarial.positions import continued_positions, visible_positions
from alum_kernels.adversarial.samples import sample_count
from alum_kernels.ops.checks import check_choice
from alum_kernels.ops.squared_error import squared_error
from alum_kernels.ops.symmetric_kl import js, kl, squared_hellinger, symmetric_kl, symmetric_kl_grad

HEADS = (
    "classification",
    "regression",
    "multiple_choice",
    "token_classification",
    "question_answering",
    "masked_lm",
    "causal_lm",
    "seq2seq_lm",
    "pretraining",
)
TOKEN_HEADS = ("masked_lm", "causal_lm", "seq2seq_lm")
"""Heads that predict a token of the vocabulary at each position."""

_POSITION_HEADS = (*TOKEN_HEADS, "token_classification")

POSITIONS = ("labelled", "all")

_LABEL_OF_FIELD = {
    "seq_relationship_logits": "next_sentence_label",
    "start_logits": "start_positions",
    "end_logits": "end_positions",
}

_DIVERGENCES = {"symmetric_kl": symmetric_kl, "kl": kl, "js": js, "squared_hellinger": squared_hellinger}


@dataclass(frozen=True)
class Head:
    """How two predictions of one head are compared.

    Every head but ``regression``, which compares squared differences, compares softmaxes of logits:

    - ``classification`` (B, V), and ``multiple_choice`` (B, C), whose classes are the choices: row by row.
    - ``token_classification`` (B, S, V): at the labelled positions.
    - ``question_answering``: two softmaxes over the S positions of a sequence, of where the answer starts and of where
      it ends; padding takes no part in either. Their divergences are added. A question without an answer has it at
      position 0, as in SQuAD 2, which is a class like the others.
    - ``masked_lm``, ``causal_lm`` and ``seq2seq_lm`` (B, S, V), V the vocabulary: at the positions that predict a
      label, which is the next token's for ``causal_lm`` and the position's own for the others.
    - ``pretraining`` is BERT's two heads: masked tokens, and whether two segments belong together; their divergences
      are added.

    Attributes:
        name: one of ``HEADS``.
        field: where a model's output has the logits.
        leading: positions of the logits before those of the batch, of virtual tokens that a model puts there. They have
            no labels, but the last one predicts the first token of a ``causal_lm``.
    """

    name: str
    field: str = "logits"
    leading: int = 0

    def __post_init__(self) -> None:
        check_choice("head", self.name, HEADS)

    @property
    def parts(self) -> tuple["Head", ...]:
        """The heads that are compared one by one."""
        if self.name == "pretraining":
            return Head("masked_lm", "prediction_logits"), Head("classification", "seq_relationship_logits")
        if self.name == "question_answering" and self.field == "logits":
            return Head(self.name, "start_logits"), Head(self.name, "end_logits")
        return (self,)

    @property
    def tokens(self) -> "Head | None":
        """The part that predicts a token of the vocabulary at each position, if there is one."""
        return next((part for part in self.parts if part.name in TOKEN_HEADS), None)

    def inputs(self, batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        """The arguments of a pass that computes no loss.

        An encoder-decoder makes its decoder's inputs from the labels, so they are made here where the batch has none.

        Raises:
            ValueError: the decoder's inputs are missing and the model or the batch has no means to make them.
        """
        inputs = without_labels(batch)
        given = any(batch.get(key) is not None for key in ("decoder_input_ids", "decoder_inputs_embeds"))
        if self.name == "seq2seq_lm" and not given:
            shifted = getattr(unwrap(model), "prepare_decoder_input_ids_from_labels", None)
            if not callable(shifted):
                raise ValueError(
                    f"batch: expected 'decoder_input_ids', since {type(unwrap(model)).__name__} has no "
                    f"prepare_decoder_input_ids_from_labels, got {', '.join(batch) or 'an empty batch'}"
                )
            inputs["decoder_input_ids"] = shifted(labels=self.labels(batch))
        return inputs

    def logits(self, outputs: Any) -> Tensor:
        """The logits in what a model returned: an object or mapping with ``field``, or a tensor."""
        if isinstance(outputs, Tensor):
            found = outputs if self.field == "logits" else None
        elif isinstance(outputs, Mapping):
            found = outputs.get(self.field)
        else:
            found = getattr(outputs, self.field, None)
        if isinstance(found, Tensor) and self.name == "regression" and found.dim() == 1:
            found = found.unsqueeze(1)  # DeBERTa drops the dimension, but only in a pass that is given labels
        if not isinstance(found, Tensor):
            raise TypeError(f"model: expected a tensor or an output with {self.field!r}, got {type(outputs).__name__}")
        expected = 3 if self.name in _POSITION_HEADS else 2
        if found.dim() != expected:
            raise ValueError(f"model: expected {expected}-d logits for a {self.name} head, got {tuple(found.shape)}")
        return found

    def predictions(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        """The logits that are compared: those of a model's output, -inf for classes that are none of this batch's.

        Args:
            outputs: what the model returned; this is one of ``parts``.
            batch: arguments of the model; its attention mask says which positions an answer cannot be at.
        """
        logits = self.logits(outputs)
        visible = visible_positions(batch) if self.name == "question_answering" else None
        if visible is None:
            return logits
        if visible.shape != logits.shape:
            raise ValueError(
                f"attention_mask: expected shape {tuple(logits.shape)} as {self.field}, got {tuple(visible.shape)}"
            )
        return logits.masked_fill(~visible, -torch.inf)

    def labels(self, batch: Mapping[str, Any]) -> Tensor:
        """Class index of each row, ``IGNORED_LABEL`` where none counts; this is one of ``parts``, but no regression.

        Returns:
            (B, S) where a position is predicted at a time, of the token that each position predicts, leading ones
            included; otherwise (B,).
            An answer's position is ignored where it is negative, outside the sequence or padding.

        Raises:
            ValueError: the batch has no such labels, or the head has none.
        """
        if self.name == "regression" or self.parts != (self,):
            parts = "is several heads; each of its parts has" if self.parts != (self,) else "has no"
            raise ValueError(f"head: {self.name} {parts} class labels")
        shifted = batch.get("shift_labels")
        if self.name == "causal_lm" and isinstance(shifted, Tensor):
            return self._led(shifted, IGNORED_LABEL)
        labels = self._checked_labels(batch, _LABEL_OF_FIELD.get(self.field, "labels"))
        if self.name == "question_answering":
            return _answers(labels, batch)
        labels = self._led(labels, IGNORED_LABEL) if self.name in _POSITION_HEADS else labels
        if self.name != "causal_lm":
            return labels
        shifted = torch.full_like(labels, IGNORED_LABEL)
        shifted[:, :-1] = labels[:, 1:]
        return shifted

    def answer_positions(self, batch: Mapping[str, Any]) -> Tensor:
        """(B,) where answers start, or end, as the batch has it; this is one of ``parts`` of question answering."""
        return self._checked_labels(batch, _LABEL_OF_FIELD[self.field])

    def _checked_labels(self, batch: Mapping[str, Any], key: str) -> Tensor:
        """(B, S) or (B,) integers."""
        labels = batch.get(key)
        by_position = self.name in _POSITION_HEADS
        shape = "(B, S)" if by_position else "(B,)"
        if not isinstance(labels, Tensor):
            listed = ", ".join(batch) or "an empty batch"
            raise ValueError(f"batch: expected {key!r} {shape} for a {self.name} head, got {listed}")
        fits = labels.dim() == 2 if by_position else labels.dim() == 1 or labels.shape[1:] == (1,)
        if not fits or labels.is_floating_point():
            came = f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise ValueError(f"batch: expected {key!r} {shape} of class indices for a {self.name} head, got {came}")
        return labels if by_position else labels.flatten()

    def row_mask(self, batch: Mapping[str, Any], positions: str = "labelled") -> Tensor | None:
        """Rows that are compared, None for all.

        Where a position is predicted at a time: the labelled ones; or with ``"all"`` those that are no padding, of
        which a decoder's are those of ``decoder_attention_mask`` (without one, the labelled ones), and of documents
        packed into a row all but each one's last; leading ones are none of them. Of answers: the sequences that have a
        position.
        """
        if self.name == "question_answering":
            visible = visible_positions(batch)
            return None if visible is None else visible.any(1)
        if self.name not in _POSITION_HEADS:
            return None
        if positions == "labelled":
            return self.labels(batch) != IGNORED_LABEL
        if self.leading:
            found = continued_positions(batch) if self.name == "causal_lm" else visible_positions(batch)
            if found is None:
                found = torch.ones_like(self._checked_labels(batch, "labels"), dtype=torch.bool)
            return self._led(found, False)
        if self.name == "causal_lm":
            return continued_positions(batch)
        if self.name == "seq2seq_lm":
            visible = visible_positions(batch, "decoder_attention_mask")
            return self.labels(batch) != IGNORED_LABEL if visible is None else visible
        return visible_positions(batch)

    def _led(self, rows: Tensor, value: int) -> Tensor:
        """(B, leading + S) of (B, S): with what stands for the leading positions."""
        return torch.nn.functional.pad(rows, (self.leading, 0), value=value) if self.leading else rows

    def row_count(self, batch: Mapping[str, Any], positions: str = "labelled") -> Tensor | int:
        """How many rows are compared; this is one of ``parts``."""
        mask = self.row_mask(batch, positions)
        if mask is not None:
            return (mask != 0).sum()
        return self.labels(batch).numel() if self.name in _POSITION_HEADS else sample_count(batch)

    def divergence(
        self,
        adv_logits: Tensor,
        logits: Tensor,
        mask: Tensor | None,
        *,
        divergence: str,
        gradient: str,
        temperature: float,
        backend: str | None,
        reduction: str = "mean",
    ) -> Tensor:
        """Mean (or sum) over the compared rows, differentiable."""
        if self.name == "regression":
            convention = "detach_clean" if gradient == "detach_clean" else "full"
            adv_logits, logits = _same_dtype(adv_logits, logits)
            return squared_error(adv_logits, logits, mask=mask, gradient=convention, reduction=reduction)
        return _DIVERGENCES[divergence](
            adv_logits,
            logits,
            mask=mask,
            reduction=reduction,
            gradient=gradient,
            temperature=temperature,
            backend=backend,
        )

    def divergence_and_gradient(
        self,
        adv_logits: Tensor,
        logits: Tensor,
        mask: Tensor | None,
        *,
        divergence: str,
        temperature: float,
        grad_scale: float,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        """Sum over the compared rows and ``grad_scale`` times its gradient to ``adv_logits``; no graph."""
        if self.name != "regression":
            return symmetric_kl_grad(
                adv_logits,
                logits,
                mask=mask,
                reduction="sum",
                gradient="detach_clean",
                temperature=temperature,
                divergence=divergence,
                grad_scale=grad_scale,
                backend=backend,
            )
        with torch.enable_grad():
            leaf = adv_logits.detach().requires_grad_()
            total = squared_error(*_same_dtype(leaf, logits.detach()), mask=mask, reduction="sum")
        (grad,) = torch.autograd.grad(total * grad_scale, leaf)
        return total.detach(), grad


def _same_dtype(adv_logits: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider dtype: DeBERTa returns predictions in that of the labels where it is given some."""
    wider = torch.promote_types(adv_logits.dtype, logits.dtype)
    return adv_logits.to(wider), logits.to(wider)


def _answers(positions: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """(B,) positions of answers, ``IGNORED_LABEL`` for those that no logit is compared for."""
    visible = visible_positions(batch)
    if visible is None:
        sequences = next((batch[key] for key in ("input_ids", "inputs_embeds") if batch.get(key) is not None), None)
        if sequences is None:
            raise ValueError(
                f"batch: expected 'input_ids', whose length bounds the answers' positions, got {', '.join(batch)}"
            )
        visible = torch.ones(sequences.shape[:2], dtype=torch.bool, device=positions.device)
    inside = (positions >= 0) & (positions < visible.shape[1])
    at = torch.where(inside, positions, 0).unsqueeze(1)
    return torch.where(inside & visible.gather(1, at).squeeze(1), positions, IGNORED_LABEL)


_SUFFIXES = {
    "ForMaskedLM": "masked_lm",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "BertForPreTraining": "pretraining",
    "ForMultipleChoice": "multiple_choice",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
    "ForQuestionAnsweringSimple": "question_answering",
    "ForConditionalGeneration": "seq2seq_lm",
    "MTModel": "seq2seq_lm",
    "ForSequenceClassification": "classification",
}
"""How the names of Hugging Face's classes end."""


def head_of(model: nn.Module, name: str | None = None) -> Head:
    """The head that is called so, or the one that is recognised, with the positions that a model puts before others.

    Raises:
        ValueError: as of :func:`detect_head`; no such name; or virtual tokens in a sequence whose predictions cannot be
            told apart from theirs.
    """
    head = detect_head(model) if name is None else Head(name)
    leading = _virtual_tokens(model)
    if leading and head.name in _UNLED:
        raise ValueError(
            f"model: expected a {head.name} model whose predictions are of the batch's positions alone, got the "
            f"{leading} virtual tokens of PEFT's {_prompt(model).peft_type.value} before them; adapters such as "
            "LoraConfig add none, and methods that compare no predictions (pgd, freelb) train such a model"
        )
    return replace(head, leading=leading) if head.name in _POSITION_HEADS else head


_UNLED = ("question_answering", "seq2seq_lm", "pretraining")
"""Heads that are not told where a model puts virtual tokens."""

_PAST = ("PREFIX_TUNING", "CARTRIDGE")
"""PEFT's prompts that are keys and values of the past, and no tokens of the sequence."""


def _prompt(model: nn.Module) -> Any:
    """PEFT's configuration of the prompt that a model learns, None where it learns none."""
    config = getattr(model, "active_peft_config", None)
    return config if getattr(config, "is_prompt_learning", False) else None


def _virtual_tokens(model: nn.Module) -> int:
    """How many tokens PEFT's wrapper puts before those of a batch."""
    prompt = _prompt(model)
    return 0 if prompt is None or prompt.peft_type.value in _PAST else prompt.num_virtual_tokens


def detect_head(model: nn.Module) -> Head:
    """The head of a model, from its class name and configuration as Hugging Face models have them.

    Raises:
        ValueError: no head is recognised, or one that cannot be compared; the message says why or how to name one.
    """
    adapted = getattr(model, "get_base_model", None)  # PEFT's wrapper, which may be called after no task
    model = adapted() if callable(adapted) else model
    name = type(model).__name__
    config = getattr(model, "config", None)
    found = next((head for suffix, head in _SUFFIXES.items() if name.endswith(suffix)), None)
    if found is None:
        listed = ", ".join(map(repr, HEADS))
        raise ValueError(f"model: no head recognised for {name}; pass head= one of {listed}")
    if found == "question_answering" and "p_mask" in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"model: {name} predicts the end of an answer for the best starts of a beam search, which differ between "
            "passes, so they cannot be compared; its simple variant (ForQuestionAnsweringSimple) can"
        )
    if found == "seq2seq_lm" and not getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model: {name} is no encoder-decoder, so what its positions predict is not known; "
            "pass head='causal_lm' if it is the next token of input_ids"
        )
    if found == "classification":
        problem = getattr(config, "problem_type", None)
        if problem == "multi_label_classification":
            raise ValueError(f"model: {name} with problem_type 'multi_label_classification' has no softmax to compare")
        if problem == "regression" or (problem is None and getattr(config, "num_labels", None) == 1):
            return Head("regression")
    return Head(found)
