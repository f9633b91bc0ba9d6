"""memory="low": the gradient of the exact step from one graph at a time."""

import copy

import pytest
import tiny_models
import torch
from method_cases import FAMILIES_OF, LARGE, check, example, run, tolerance
from torch import Tensor

from alum_kernels import AdversarialConfig, AdversarialObjective

HIGH = AdversarialConfig.alum_finetuning(normalize="linf", fused_head=False, **LARGE)


@pytest.mark.parametrize("task", list(FAMILIES_OF))
def test_it_is_the_step_written_by_hand(task):
    family = FAMILIES_OF[task][0]
    check(family, task, HIGH.replace(memory="low", steps=2), rtol=tolerance(HIGH, family))


@pytest.mark.parametrize("gradient", ["full", "detach_targets", "detach_clean"])
@pytest.mark.parametrize(
    "changes", [{}, {"alpha": 7.0, "divergence": "kl"}, {"steps": 0}, {"clean_weight": 0.0}], ids=str
)
def test_every_convention_gives_the_gradient_of_the_exact_step(gradient, changes):
    config = HIGH.replace(gradient=gradient, **changes)
    model, batch = example("bert", "classification")
    expected, gradients = run("bert", copy.deepcopy(model), batch, config)
    output, found = run("bert", copy.deepcopy(model), batch, config.replace(memory="low"))
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(output.divergence, expected.divergence, rtol=1e-12, atol=0)
    for name, grad in gradients.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("positions", ["labelled", "all"])
@pytest.mark.parametrize("capacity", [None, 0.6])
def test_a_linear_head_gets_its_share_by_the_divergence(positions, capacity):
    batch = tiny_models.masked_lm_batch()
    results = []
    for memory in ("high", "low"):
        model = tiny_models.bert_masked_lm(0.2).double()
        config = HIGH.replace(fused_head=True, memory=memory, positions=positions, labelled_capacity=capacity)
        torch.manual_seed(3)
        figures = AdversarialObjective(model, config).backward(batch, scale=0.25)
        results.append((figures, tiny_models.Gradients.of(model).flat()))
    (exact, gradients), (low, found) = results
    assert float(low["divergence"]) == pytest.approx(float(exact["divergence"]), rel=1e-12)
    assert float(low["loss"]) == pytest.approx(float(exact["loss"]), rel=1e-12)
    torch.testing.assert_close(found, gradients, rtol=1e-6, atol=1e-12)


def test_the_scale_of_a_trainer_multiplies_every_part():
    model, batch = tiny_models.bert(0.3), tiny_models.classification_batch()
    gradients = []
    for scale in (1.0, 2.0**-4):
        model.zero_grad()
        torch.manual_seed(0)
        AdversarialObjective(model, HIGH.replace(memory="low")).backward(batch, scale=scale)
        gradients.append(tiny_models.Gradients.of(model).flat())
    torch.testing.assert_close(gradients[1] * 2.0**4, gradients[0], rtol=1e-6, atol=1e-9)


def test_half_precision_predictions_keep_small_gradients():
    """dJ/da near 1e-7 is subnormal in fp16; a linear head's hidden states stay in it."""
    model, batch = tiny_models.bert_masked_lm(), tiny_models.masked_lm_batch()
    small = HIGH.replace(std=1e-4, step_size=1e-4, epsilon=1e-4, fused_head=True, alpha=1e-2, clean_weight=0.0)
    gradients = []
    for memory in ("high", "low"):
        model.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss_scale = 2.0**16
            AdversarialObjective(model, small.replace(memory=memory)).backward(batch, scale=loss_scale)
        gradients.append(tiny_models.Gradients.of(model).flat())
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert gradients[0].norm() > 0
    assert cosine > 0.99


def test_an_infinite_logit_that_cannot_be_leaves_the_loss_finite():
    model, batch = tiny_models.make("bert", "spans"), tiny_models.spans_batch()
    figures = AdversarialObjective(model, HIGH.replace(memory="low")).backward(batch)
    assert all(bool(torch.isfinite(value)) for value in figures.values())


def test_it_needs_the_caller_s_backward():
    objective = AdversarialObjective(tiny_models.bert(), HIGH.replace(memory="low"))
    with pytest.raises(ValueError, match=r"^backward: alum_finetuning holds one graph at a time"):
        objective(**tiny_models.classification_batch())


class LiveGraphs:
    """How many bytes of saved tensors are alive at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> "Saved":
        return Saved(self, tensor)


class Saved:
    """One saved tensor, counted while it lives."""

    def __init__(self, graphs: LiveGraphs, tensor: Tensor) -> None:
        self.graphs, self.tensor = graphs, tensor
        graphs.now += tensor.nbytes
        graphs.most = max(graphs.most, graphs.now)

    def __del__(self) -> None:
        self.graphs.now -= self.tensor.nbytes


def test_one_graph_is_alive_at_a_time():
    batch = tiny_models.classification_batch(8, 20)
    most = {}
    for memory in ("standard", "high", "low"):
        model, graphs = tiny_models.bert(0.1), LiveGraphs()
        with torch.autograd.graph.saved_tensors_hooks(graphs.pack, lambda saved: saved.tensor):
            if memory == "standard":
                model(**batch).loss.backward()
            else:
                AdversarialObjective(model, HIGH.replace(memory=memory)).backward(batch)
        most[memory] = graphs.most
    assert most["high"] > 1.9 * most["standard"]
    assert most["low"] < 1.02 * most["standard"]
