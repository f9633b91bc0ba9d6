"""``torch.compile`` of the model, with the wrapper outside and inside."""

import pytest
import tiny_models
import torch
from method_cases import MOVED
from processes import group_of_one

from alum_kernels import AdversarialObjective

QUIET = MOVED.replace(telemetry=False)
SAVINGS = [
    {},
    {"steps": 2, "normalize": "sign"},
    {"memory": "low"},
    {"adversarial_fraction": 0.5},
    {"ascent_depth": 1},
]


def gradients(model, objective, batch: dict, steps: int = 3) -> torch.Tensor:
    """Of the last of some steps, whose compiled code was there before."""
    for seed in range(steps):
        model.zero_grad()
        torch.manual_seed(seed)
        output = objective.forward(batch, seed=torch.tensor([seed]), backward=torch.Tensor.backward)
        output.loss.backward()
    return tiny_models.Gradients.of(model).flat()


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        pytest.param("masked_lm", {}, marks=pytest.mark.slow),
        ("classification", SAVINGS[0]),
        *(pytest.param("classification", changes, marks=pytest.mark.slow) for changes in SAVINGS[1:]),
    ],
    ids=str,
)
def test_a_model_compiled_inside_the_wrapper_trains_as_it_does(task, changes):
    make, make_batch = (
        (tiny_models.bert, tiny_models.classification_batch)
        if task == "classification"
        else (tiny_models.bert_masked_lm, tiny_models.masked_lm_batch)
    )
    batch, config = make_batch(), QUIET.replace(**changes)
    plain = make()
    expected = gradients(plain, AdversarialObjective(plain, config), batch)
    torch._dynamo.reset()
    compiled = make()
    objective = AdversarialObjective(compiled, config)
    compiled.compile(backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, objective, batch), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_model_that_was_compiled_before_is_seen_through():
    batch = tiny_models.classification_batch()
    plain = tiny_models.bert()
    expected = gradients(plain, AdversarialObjective(plain, QUIET), batch)
    torch._dynamo.reset()
    model = tiny_models.bert()
    compiled = torch.compile(model, backend="aot_eager")
    objective = AdversarialObjective(compiled, QUIET)
    assert objective.head.name == "classification"
    torch.testing.assert_close(gradients(model, objective, batch), expected, rtol=1e-4, atol=1e-6)


def test_parallel_models_are_compiled_inside(tmp_path):
    with group_of_one(tmp_path):
        wrapped = torch.nn.parallel.DistributedDataParallel(tiny_models.bert())
        with pytest.raises(ValueError, match=r"^model: expected DistributedDataParallel around a compiled model"):
            AdversarialObjective(torch.compile(wrapped), QUIET)


@pytest.mark.parametrize("changes", [{}, pytest.param({"ascent_depth": 1}, marks=pytest.mark.slow)], ids=str)
def test_steps_compile_nothing_after_the_first_two(changes):
    torch._dynamo.reset()
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    objective = AdversarialObjective(model, QUIET.replace(**changes))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model.compile(backend=count)
    gradients(model, objective, batch, 2)
    after_two = len(graphs)
    gradients(model, objective, batch, 3)
    assert len(graphs) == after_two > 0
