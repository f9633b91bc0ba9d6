"""The precision of the ascent's passes, beside that of the training."""

import pytest
import tiny_models
import torch
from method_cases import MOVED

from alum_kernels import AdversarialObjective
from alum_kernels.adversarial import ascent_precision
from alum_kernels.adversarial.float8_layers import Float8Layers


def watched_dtypes(model: torch.nn.Module) -> list[torch.dtype]:
    """Of what a linear layer gives, pass by pass."""
    seen: list[torch.dtype] = []
    model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    return seen


@pytest.mark.parametrize(
    ("name", "training", "expected"),
    [
        ("bfloat16", None, [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]),
        ("float16", None, [torch.float32, torch.float16, torch.float16, torch.float32]),
        ("float32", torch.bfloat16, [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]),
        (None, torch.bfloat16, [torch.bfloat16] * 4),
    ],
)
def test_only_the_ascent_computes_in_it(name, training, expected):
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    seen = watched_dtypes(model)
    objective = AdversarialObjective(model, MOVED.replace(ascent_dtype=name, steps=2))
    with torch.autocast("cpu", training or torch.bfloat16, enabled=training is not None):
        loss = objective(**batch).loss
    loss.backward()
    assert seen == expected
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "least", "most"), [("float32", 1.0, 1.0), ("float16", 0.999, 1.0), ("bfloat16", 0.95, 0.9999)]
)
def test_the_cosine_tells_what_the_precision_costs(name, least, most):
    model, batch = tiny_models.bert(0.1), tiny_models.classification_batch()
    config = MOVED.replace(ascent_dtype=name, signal_check_interval=1)
    objective = AdversarialObjective(model, config)
    objective.backward(batch)
    assert least - 1e-6 <= objective.telemetry.read()["ascent_cosine"] <= most + 1e-6


def test_without_another_precision_there_is_no_cosine():
    objective = AdversarialObjective(tiny_models.bert(), MOVED.replace(signal_check_interval=1))
    objective.backward(tiny_models.classification_batch())
    assert "ascent_cosine" not in objective.telemetry.read()


@pytest.mark.parametrize("positions", ["labelled", "all"])
def test_a_language_model_climbs_in_it_too(positions):
    model, batch = tiny_models.bert_masked_lm(), tiny_models.masked_lm_batch()
    found = {}
    for name in (None, "bfloat16"):
        objective = AdversarialObjective(model, MOVED.replace(ascent_dtype=name, fused_head=True, positions=positions))
        objective.backward(batch)
        found[name] = objective.telemetry.read()["ascent_gain"]
    assert found["bfloat16"] == pytest.approx(found[None], rel=0.2)


def test_fp8_is_refused_where_it_cannot_be():
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match=r"^ascent_dtype: .*compute capability 8.9 or later .*, got cpu"):
        AdversarialObjective(tiny_models.bert(), MOVED.replace(ascent_dtype="float8"))
    with pytest.raises(ValueError, match=r"^ascent_dtype: expected linear layers .* BagOfEmbeddings has none"):
        Float8Layers(tiny_models.BagOfEmbeddings(), emulate=True)


def test_fp8_climbs_in_nearly_the_same_direction(monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr(ascent_precision, "Float8Layers", lambda model: Float8Layers(model, emulate=True))
    model, batch = tiny_models.bert(), tiny_models.classification_batch(16, 20)
    far = MOVED.replace(std=0.3, epsilon=0.3, step_size=0.3, ascent_dtype="float8", signal_check_interval=1)
    objective = AdversarialObjective(model, far)
    objective.backward(batch)
    assert 0.8 < objective.telemetry.read()["ascent_cosine"] < 0.9999
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.gpu
def test_fp8_on_a_gpu_that_has_it():
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    model = tiny_models.bert(0.0).cuda()
    batch = {name: value.cuda() for name, value in tiny_models.classification_batch(16, 20).items()}
    far = MOVED.replace(std=0.3, epsilon=0.3, step_size=0.3, ascent_dtype="float8", signal_check_interval=1)
    objective = AdversarialObjective(model, far)
    objective.backward(batch)
    assert 0.8 < objective.telemetry.read()["ascent_cosine"] < 1.0
