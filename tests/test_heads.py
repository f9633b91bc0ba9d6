"""Heads: how one is recognised, what it reads, and what it refuses."""

from types import SimpleNamespace

import pytest
import tiny_models
import torch
import transformers

from alum_kernels import squared_error, symmetric_kl
from alum_kernels.adversarial.heads import Head, detect_head
from alum_kernels.backends.reference import symmetric_kl as reference

OPTIONS = {"divergence": "symmetric_kl", "temperature": 1.0, "backend": None}


@pytest.mark.parametrize("name", tiny_models.CLASSIFIERS)
def test_sequence_classifiers_are_recognised(name):
    assert detect_head(tiny_models.CLASSIFIERS[name]()) == Head("classification")


def test_regression_and_masked_lm_are_recognised():
    assert detect_head(tiny_models.bert(labels=1)) == Head("regression")
    assert detect_head(tiny_models.bert(labels=2, problem_type="regression")) == Head("regression")
    assert detect_head(tiny_models.bert_masked_lm()) == Head("masked_lm")


def test_what_is_not_recognised_says_what_to_do():
    with pytest.raises(ValueError, match="no head recognised for Linear; pass head= one of 'classification'"):
        detect_head(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="multi_label_classification"):
        detect_head(tiny_models.bert(problem_type="multi_label_classification"))
    with pytest.raises(ValueError, match=r"^head: expected one of 'classification'"):
        Head("tagging")


def test_logits_are_found_in_every_kind_of_output():
    logits = torch.randn(2, 3)
    head = Head("classification")
    output = transformers.modeling_outputs.SequenceClassifierOutput(logits=logits)
    for given in (logits, {"logits": logits}, output, SimpleNamespace(logits=logits)):
        assert head.logits(given) is logits
    for wrong in ((logits,), {"scores": logits}, None):
        with pytest.raises(TypeError, match="expected a tensor or an output with 'logits'"):
            head.logits(wrong)
    with pytest.raises(ValueError, match=r"expected 3-d logits for a masked_lm head, got \(2, 3\)"):
        Head("masked_lm").logits(logits)


def test_masked_lm_compares_labelled_positions_only():
    torch.manual_seed(0)
    head, labels = Head("masked_lm"), torch.tensor([[5, -100, 7], [-100, -100, 0]])
    mask = head.row_mask({"labels": labels})
    assert mask.tolist() == [[True, False, True], [False, False, True]]
    assert Head("classification").row_mask({"labels": labels}) is None
    adv_logits, logits = torch.randn(2, 3, 11, dtype=torch.float64), torch.randn(2, 3, 11, dtype=torch.float64)
    mean = head.divergence(adv_logits, logits, mask, gradient="full", **OPTIONS)
    rows, _ = reference.loss(adv_logits[mask], logits[mask], None, divergence="symmetric_kl", inv_temperature=1.0)
    torch.testing.assert_close(mean, rows.mean(), rtol=1e-13, atol=0)
    total, grad = head.divergence_and_gradient(adv_logits, logits, mask, grad_scale=4.0, **OPTIONS)
    torch.testing.assert_close(total, rows.sum(), rtol=1e-13, atol=0)
    assert (grad[~mask] == 0).all()
    assert (grad[mask] != 0).all()
    with pytest.raises(ValueError, match="expected 'labels'"):
        head.row_mask({})


@pytest.mark.parametrize("name", ["classification", "regression"])
def test_the_ascent_gradient_is_that_of_the_sum(name):
    torch.manual_seed(0)
    adv_logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(5, 3, dtype=torch.float64)
    total, grad = Head(name).divergence_and_gradient(adv_logits, logits, None, grad_scale=8.0, **OPTIONS)
    op = squared_error if name == "regression" else symmetric_kl
    expected = op(adv_logits, logits, reduction="sum", gradient="detach_clean")
    (expected_grad,) = torch.autograd.grad(expected, adv_logits)
    torch.testing.assert_close(total, expected.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, 8 * expected_grad, rtol=1e-12, atol=0)
    assert not total.requires_grad
    assert not grad.requires_grad


def test_regression_detaches_the_clean_side_only_where_asked():
    adv_logits, logits = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[3.0]], requires_grad=True)
    for gradient, clean in (("full", 4.0), ("detach_targets", 4.0), ("detach_clean", None)):
        loss = Head("regression").divergence(adv_logits, logits, None, gradient=gradient, **OPTIONS)
        grads = torch.autograd.grad(loss, (adv_logits, logits), allow_unused=True)
        assert loss.item() == 4.0
        assert grads[0].item() == -4.0
        assert (None if grads[1] is None else grads[1].item()) == clean
