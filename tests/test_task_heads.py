"""What each kind of head reads from a batch and from a model's output: classes, labels, compared rows and inputs."""

from types import SimpleNamespace

import pytest
import tiny_models
import torch
import transformers

from alum_kernels import AdversarialConfig
from alum_kernels.adversarial.heads import HEADS, Head, detect_head
from alum_kernels.adversarial.labels import IGNORED_LABEL, LABEL_KEYS
from alum_kernels.adversarial.passes import LogitPasses
from alum_kernels.adversarial.predictions import mean_divergences

ANSWER = Head("question_answering")
START, END = ANSWER.parts
XLNET = transformers.XLNetConfig(vocab_size=48, d_model=16, n_layer=1, n_head=2, d_inner=24)


def test_the_name_of_a_class_says_what_it_predicts():
    marian = tiny_models.FAMILIES["bart"].options | {"scale_embedding": True}
    assert detect_head(transformers.MarianMTModel(transformers.MarianConfig(**marian))) == Head("seq2seq_lm")
    assert detect_head(transformers.XLNetForQuestionAnsweringSimple(XLNET)) == ANSWER
    assert {tiny_models.HEAD_OF[task] for task in tiny_models.FAMILIES_OF} | {"pretraining"} == set(HEADS)


def test_what_cannot_be_compared_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"XLNetForQuestionAnswering predicts .* beam search.*QuestionAnsweringSimple"):
        detect_head(transformers.XLNetForQuestionAnswering(XLNET))
    named = type("LlavaForConditionalGeneration", (torch.nn.Module,), {"config": SimpleNamespace()})
    with pytest.raises(ValueError, match=r"Llava\w+ is no encoder-decoder.*pass head='causal_lm'"):
        detect_head(named())
    with pytest.raises(ValueError, match="problem_type 'multi_label_classification' has no softmax"):
        detect_head(tiny_models.make("bert", "classification", problem_type="multi_label_classification"))


def test_only_heads_over_a_vocabulary_may_be_fused():
    fused = {name for name in HEADS if Head(name).tokens is not None}
    assert fused == {"masked_lm", "causal_lm", "seq2seq_lm", "pretraining"}


@pytest.mark.parametrize("name", ["classification", "multiple_choice"])
def test_labels_of_rows(name):
    for shape in ((3,), (3, 1)):
        found = Head(name).labels({"labels": torch.tensor([2, 0, IGNORED_LABEL]).reshape(shape)})
        assert found.tolist() == [2, 0, IGNORED_LABEL]
    assert Head(name).row_mask({"labels": torch.zeros(3, dtype=torch.long)}) is None
    for wrong in (torch.zeros(3), torch.zeros(3, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match=rf"^batch: expected 'labels' \(B,\) of class indices for a {name} head"):
            Head(name).labels({"labels": wrong})
    with pytest.raises(ValueError, match=rf"^batch: expected 'labels' \(B,\) for a {name} head, got input_ids"):
        Head(name).labels({"input_ids": wrong})


def test_labels_of_positions():
    batch = tiny_models.batch("token_labels")
    head = Head("token_classification")
    assert head.labels(batch) is batch["labels"]
    assert torch.equal(head.row_mask(batch), batch["labels"] != -100)
    assert torch.equal(head.row_mask(batch, "all"), batch["attention_mask"] == 1)
    assert head.row_mask({"labels": batch["labels"]}, "all") is None
    with pytest.raises(ValueError, match=r"^batch: expected 'labels' \(B, S\) of class indices for a token_class"):
        head.labels({"labels": torch.zeros(3, dtype=torch.long)})
    with pytest.raises(ValueError, match=r"expected 3-d logits for a token_classification head, got \(4, 3\)"):
        head.logits(torch.zeros(4, 3))


def test_labels_of_causal_and_of_other_language_models():
    labels = torch.tensor([[5, -100, 7, 8]])
    assert Head("masked_lm").labels({"labels": labels}).tolist() == [[5, -100, 7, 8]]
    assert Head("seq2seq_lm").labels({"labels": labels}).tolist() == [[5, -100, 7, 8]]
    assert Head("causal_lm").labels({"labels": labels}).tolist() == [[-100, 7, 8, -100]]
    assert Head("causal_lm").labels({"shift_labels": labels}) is labels


def test_heads_of_several_parts_are_asked_by_part():
    batch = tiny_models.pretraining_batch()
    tokens, sentences = Head("pretraining").parts
    assert tokens.labels(batch) is batch["labels"]
    assert torch.equal(sentences.labels(batch), batch["next_sentence_label"])
    for name in ("pretraining", "question_answering"):
        with pytest.raises(ValueError, match=f"^head: {name} is several heads; each of its parts has class labels"):
            Head(name).labels(batch)
    with pytest.raises(ValueError, match=r"^head: regression has no class labels"):
        Head("regression").labels({"labels": torch.zeros(3)})


def test_labels_of_answers():
    """Those at a position that a softmax has: not negative, inside of the sequence, and no padding."""
    mask = torch.tensor([[1, 1, 1, 0]] * 6)
    batch = {"start_positions": torch.tensor([0, 2, 3, 4, 9, -1]), "end_positions": torch.tensor([[2]] * 6)}
    assert START.labels({**batch, "attention_mask": mask}).tolist() == [0, 2, -100, -100, -100, -100]
    assert END.labels({**batch, "attention_mask": mask}).tolist() == [2] * 6
    for sequences in ({"input_ids": mask}, {"inputs_embeds": torch.zeros(6, 4, 8)}):
        assert START.labels({**batch, **sequences}).tolist() == [0, 2, 3, -100, -100, -100]
    with pytest.raises(ValueError, match="expected 'input_ids', whose length bounds"):
        START.labels(batch)
    with pytest.raises(ValueError, match=r"^batch: expected 'end_positions' \(B,\) for a question_answering head"):
        END.labels({"start_positions": mask})


def test_padding_is_no_class_of_an_answer():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    outputs = SimpleNamespace(start_logits=torch.randn(3, 4), end_logits=torch.randn(3, 4))
    found = END.predictions(outputs, {"attention_mask": mask})
    assert torch.equal(found, torch.where(mask == 1, outputs.end_logits, -torch.inf))
    assert START.predictions(outputs, {}) is outputs.start_logits
    assert START.row_mask({"attention_mask": mask}).tolist() == [True, True, False]
    assert START.row_mask({}) is None
    with pytest.raises(ValueError, match=r"^attention_mask: expected shape \(3, 4\) as start_logits, got \(3, 3\)"):
        START.predictions(outputs, {"attention_mask": mask[:, :3]})
    with pytest.raises(TypeError, match="'start_logits', got Tensor"):
        START.logits(outputs.start_logits)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_sequence_of_padding_alone_has_no_answer_to_compare(backend):
    torch.manual_seed(0)
    batch = {"attention_mask": torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]])}
    sides = [{key: torch.randn(2, 4, requires_grad=True) for key in ("start_logits", "end_logits")} for _ in range(2)]
    passes = LogitPasses(ANSWER, batch, "labelled")
    found = mean_divergences(*(passes.read(side) for side in sides), AdversarialConfig(backend=backend))
    for key, divergence in zip(("start_logits", "end_logits"), found, strict=True):
        log_p, log_q = (side[key][0, :3].double().log_softmax(-1) for side in sides)
        expected = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()
        torch.testing.assert_close(divergence.double(), expected, rtol=1e-6, atol=0)
    for grad in torch.autograd.grad(found.sum(), [logits for side in sides for logits in side.values()]):
        assert (grad[0, :3] != 0).all()
        assert (grad[0, 3:] == 0).all()
        assert (grad[1] == 0).all()


@pytest.mark.parametrize("family", tiny_models.FAMILIES_OF["seq2seq"])
def test_a_decoder_gets_its_inputs_where_the_labels_are_left_out(family):
    model, batch = tiny_models.make(family, "seq2seq"), tiny_models.batch("seq2seq")
    head = Head("seq2seq_lm")
    inputs = head.inputs(batch, model)
    assert set(inputs) == {"input_ids", "attention_mask", "decoder_input_ids"}
    assert torch.equal(model(**inputs).logits, model(**batch).logits)
    given = {**batch, "decoder_input_ids": batch["labels"].clamp(min=3)}
    assert head.inputs(given, model)["decoder_input_ids"] is given["decoder_input_ids"]
    embeds = {**batch, "decoder_inputs_embeds": torch.zeros(4, 5, 16)}
    assert "decoder_input_ids" not in head.inputs(embeds, model)
    with pytest.raises(ValueError, match=r"^batch: expected 'labels' \(B, S\) for a seq2seq_lm head"):
        head.inputs({"input_ids": batch["input_ids"]}, model)
    with pytest.raises(ValueError, match="expected 'decoder_input_ids', since Linear has no prepare_decoder_input_ids"):
        head.inputs(batch, torch.nn.Linear(2, 2))


def test_rows_of_a_decoder():
    batch = tiny_models.batch("seq2seq")
    head, labelled = Head("seq2seq_lm"), batch["labels"] != -100
    assert torch.equal(head.row_mask(batch), labelled)
    assert torch.equal(head.row_mask(batch, "all"), labelled)
    mask = torch.ones_like(batch["labels"])
    mask[0, 0] = 0
    assert torch.equal(head.row_mask({**batch, "decoder_attention_mask": mask}, "all"), mask == 1)


def test_inputs_are_the_batch_without_its_labels():
    batch = dict.fromkeys((*LABEL_KEYS, "input_ids", "p_mask", "token_type_ids"), torch.zeros(2, 3))
    for name in HEADS:
        if name != "seq2seq_lm":
            assert set(Head(name).inputs(batch, torch.nn.Linear(2, 2))) == {"input_ids", "p_mask", "token_type_ids"}


def test_regression_of_one_dimension_and_of_two_dtypes():
    """DeBERTa's labelled pass returns (B,) predictions in the labels' dtype, its other passes (B, 1) in its own."""
    head = Head("regression")
    clean = head.logits({"logits": torch.tensor([1.0, 2.0])})
    adv = head.logits({"logits": torch.tensor([[1.5], [4.0]], dtype=torch.bfloat16, requires_grad=True)})
    options = {"divergence": "symmetric_kl", "temperature": 1.0, "backend": None}
    mean = head.divergence(adv, clean, None, gradient="full", **options)
    assert mean.item() == (0.25 + 4.0) / 2
    assert torch.autograd.grad(mean, adv)[0].tolist() == [[0.5], [2.0]]
    total, grad = head.divergence_and_gradient(adv, clean, None, grad_scale=2.0, **options)
    assert total.item() == 4.25
    assert grad.dtype == torch.bfloat16
    assert grad.tolist() == [[2.0], [8.0]]
