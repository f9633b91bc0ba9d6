"""What people switch on in a training, with every kind of step: the gradients are those of the plain step.

The plain step, in full precision and without any option, is held against one written by hand in ``test_methods.py``.
"""

import copy
from collections.abc import Callable

import pytest
import tiny_models
import torch
from climbed import Climbed
from tiny_loops import APART, assert_alike
from tiny_models import Gradients
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.adversarial.config import PRESETS

SIZES = {"std": 2e-2, "step_size": 5e-2, "epsilon": 4e-2}
ALUM = AdversarialConfig.alum_finetuning(normalize="linf", **SIZES)
METHODS = {
    "alum": ALUM,
    "smart": AdversarialConfig.smart(**SIZES),
    "freelb": AdversarialConfig.freelb(**SIZES),
    "pgd": AdversarialConfig.pgd(**SIZES),
    "low memory": ALUM.replace(memory="low"),
}
BATCHES = {"classification": tiny_models.classification_batch, "masked_lm": tiny_models.masked_lm_batch}
SEED = 977

Differentiate = Callable[[Tensor], None]

every_method = pytest.mark.parametrize("method", METHODS)
every_task = pytest.mark.parametrize("task", BATCHES)


def model_of(task: str, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Module:
    make = tiny_models.bert if task == "classification" else tiny_models.bert_masked_lm
    return make(dropout).to(dtype)


def step(
    objective: AdversarialObjective,
    batch: dict[str, Tensor],
    differentiate: Differentiate = Tensor.backward,
    *,
    sample_offset: int = 0,
    autocast: torch.dtype | None = None,
    samples: list[int] | None = None,
) -> Tensor:
    """One step, whose gradients are added to those in the model; its loss."""
    torch.manual_seed(5)  # of dropout
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        output = objective.forward(
            batch,
            seed=torch.tensor([SEED]),
            sample_offset=sample_offset,
            backward=differentiate,
            samples=samples,
        )
    differentiate(output.loss)
    return output.loss.detach()


def plain(task: str, method: str, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Gradients:
    model = model_of(task, dropout, dtype)
    step(AdversarialObjective(model, METHODS[method]), BATCHES[task]())
    gradients = Gradients.of(model)
    assert gradients.flat().abs().max() > 1e-4
    return gradients


def assert_same(model: nn.Module, expected: Gradients, rtol: float = 1e-9) -> None:
    scale = expected.flat().abs().max().item()
    for name, grad in Gradients.of(model).values.items():
        want = expected.values[name]
        assert (grad is None) == (want is None), name
        if grad is not None:
            torch.testing.assert_close(
                grad, want, rtol=rtol, atol=rtol * scale * 1e-2, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("method", [name for name, config in METHODS.items() if not config.trains_in_parts])
@every_task
def test_the_two_ways_to_call_a_step_are_one(method, task):
    batch, found = BATCHES[task](), []
    for by_hand in (True, False):
        model = model_of(task, 0.2)
        objective = AdversarialObjective(model, METHODS[method].replace(seed=SEED))
        torch.manual_seed(5)
        if by_hand:
            objective(**batch).loss.backward()
        else:
            objective.backward(batch)
        found.append(Gradients.of(model))
    assert_same(model, found[0])


@every_method
@every_task
def test_accumulated_batches_are_one_batch(method, task):
    expected, model, batch = plain(task, method), model_of(task), BATCHES[task]()
    objective = AdversarialObjective(model, METHODS[method])
    labels = int((batch["labels"] != -100).sum())
    for rows in (slice(0, 1), slice(1, 4)):
        part = {name: value[rows] for name, value in batch.items()}
        share = int((part["labels"] != -100).sum()) / labels
        step(objective, part, lambda loss, share=share: (loss * share).backward(), sample_offset=rows.start)
    assert_same(model, expected)


@every_method
@every_task
def test_clipped_gradients_are_the_plain_ones_clipped(method, task):
    expected, model = plain(task, method), model_of(task)
    step(AdversarialObjective(model, METHODS[method]), BATCHES[task]())
    norm = expected.flat().norm()
    found = nn.utils.clip_grad_norm_(model.parameters(), float(norm) / 3)
    torch.testing.assert_close(found, norm, rtol=1e-9, atol=0)
    factor = 1 / (3 + 1e-6 * 3 / norm)
    assert_same(model, Gradients({n: None if g is None else factor * g for n, g in expected.values.items()}), 1e-7)


@every_method
@every_task
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_trains_as_full_precision_does(method, task, dtype):
    expected, model = plain(task, method).flat().float(), model_of(task, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=dtype == torch.float16)
    objective = AdversarialObjective(model, METHODS[method])
    step(objective, BATCHES[task](), lambda loss: scaler.scale(loss).backward(), autocast=dtype)
    scaler.unscale_(optimizer)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    found = Gradients.of(model).flat()
    assert torch.cosine_similarity(found, expected, 0) > (0.97 if dtype == torch.bfloat16 else 0.999)
    assert 0.95 < found.norm() / expected.norm() < 1.05


@every_method
@every_task
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_accumulated_and_clipped_in_mixed_precision(method, task, dtype):
    """Scaled micro-batches, unscaled once and clipped: what the whole batch leaves in the same precision, clipped."""
    config, batch, found = METHODS[method].replace(std=0.1, step_size=0.2, epsilon=0.2), BATCHES[task](), []
    labels = int((batch["labels"] != -100).sum())
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        model = model_of(task, dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=dtype == torch.float16)
        objective = AdversarialObjective(model, config)
        for rows in parts:
            part = {name: value[rows] for name, value in batch.items()}
            share = int((part["labels"] != -100).sum()) / labels

            def differentiate(loss: Tensor, share: float = share, scaler: torch.amp.GradScaler = scaler) -> None:
                scaler.scale(loss * share).backward()

            step(objective, part, differentiate, sample_offset=rows.start, autocast=dtype)
        scaler.unscale_(optimizer)
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.2
        found.append(Gradients.of(model).flat())
        assert found[-1].norm() == pytest.approx(0.1, rel=1e-4)
    assert_alike(found[1:], found[:1], APART[dtype])


@every_method
@every_task
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointed_layers_have_the_same_gradients(method, task, dropout):
    expected, model = plain(task, method, dropout), model_of(task, dropout)
    model.activation_checkpointing_enable({"use_reentrant": False})
    step(AdversarialObjective(model, METHODS[method]), BATCHES[task]())
    assert_same(model, expected)


def frozen(model: nn.Module, part: str) -> list[str]:
    """Names of the parameters that are frozen."""
    names = {
        "embeddings": lambda name: "word_embeddings" in name,
        "all embeddings": lambda name: ".embeddings." in name,
        "encoder": lambda name: name.startswith("bert."),
    }[part]
    chosen = [(name, p) for name, p in model.named_parameters() if names(name)]
    for _, parameter in chosen:
        parameter.requires_grad_(False)
    assert chosen
    return [name for name, _ in chosen]


@every_method
@every_task
@pytest.mark.parametrize("part", ["embeddings", "all embeddings", "encoder"])
def test_frozen_parameters_get_no_gradient_and_change_no_other(method, task, part):
    expected, model = plain(task, method), model_of(task)
    for name in frozen(model, part):
        expected.values[name] = None
    step(AdversarialObjective(model, METHODS[method]), BATCHES[task]())
    assert_same(model, expected)


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("alum")])
@pytest.mark.parametrize("part", ["all embeddings", "encoder"])
def test_every_method_trains_what_is_left(name, part):
    config, found = getattr(AdversarialConfig, name)(seed=SEED), []
    for freezes in (False, True):
        model = model_of("classification")
        names = frozen(model, part) if freezes else []
        update = {"update": lambda: None} if config.backward == "replay" else {}
        AdversarialObjective(model, config).backward(BATCHES["classification"](), **update)
        found.append(Gradients.of(model))
    for frozen_name in names:
        found[0].values[frozen_name] = None
    assert_same(model, found[0], 1e-7 if config.ascent == "linearity" else 1e-9)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "freelb"])
@every_task
def test_an_overflow_of_the_last_backward_is_its_own_alone(method, task, monkeypatch):
    """The ascent, the figures and the next step are those of a training without a scaler."""
    results, climbed = [], Climbed(monkeypatch)
    for scale in (1.0, 2.0**60):
        model = model_of(task, dtype=torch.float32)
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        objective, batch = AdversarialObjective(model, METHODS[method]), BATCHES[task]()

        def scaled(loss: Tensor, scaler: torch.amp.GradScaler = scaler) -> None:
            scaler.scale(loss).backward()

        loss = step(objective, batch, scaled, autocast=torch.float16)
        figures = objective.telemetry.read()
        overflows = scale > 1
        assert (not torch.isfinite(Gradients.of(model).flat()).all()) == overflows
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) == overflows
        model.load_state_dict(before)
        scaler.update(new_scale=2.0**8)
        model.zero_grad()
        step(objective, batch, scaled, autocast=torch.float16)
        scaler.unscale_(optimizer)
        ascents, climbed.gradients = climbed.gradients, []
        results.append((loss, figures, ascents, Gradients.of(model).flat(), objective.telemetry.read()))
    plain, overflowed = results
    assert torch.equal(plain[0], overflowed[0])
    assert plain[1] == overflowed[1] == plain[4] == overflowed[4]
    assert plain[1]["non_finite"] == 0
    assert len(plain[2]) == len(overflowed[2]) > 0
    assert all(map(torch.equal, plain[2], overflowed[2]))
    assert torch.equal(plain[3], overflowed[3])


@every_task
def test_a_kept_perturbation_survives_an_overflow(task):
    found, batch = [], BATCHES[task]()
    for scale in (1.0, 2.0**60):
        model = model_of(task, dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        objective = AdversarialObjective(model, ALUM.replace(delta_lifetime=2))
        options = {"autocast": torch.float16, "samples": [3, 1, 4, 15]}
        first = step(objective, batch, lambda loss, scaler=scaler: scaler.scale(loss).backward(), **options)
        assert torch.isfinite(Gradients.of(model).flat()).all() == (scale == 1.0)
        model.zero_grad()
        found.append((first, step(objective, batch, **options), Gradients.of(model).flat()))
    for plain_one, overflowed in zip(*found, strict=True):
        assert torch.equal(plain_one, overflowed)


@every_task
def test_a_perturbation_that_climbs_by_the_scaled_backward_stays_where_that_overflows(task, monkeypatch):
    """FreeLB has the gradient of its perturbation from the backward that trains: the scaler skips the whole step."""
    climbed, model = Climbed(monkeypatch), model_of(task, dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    objective, batch = AdversarialObjective(model, METHODS["freelb"]), BATCHES[task]()
    loss = step(objective, batch, lambda loss: scaler.scale(loss).backward(), autocast=torch.float16)
    assert torch.isfinite(loss)
    assert not any(torch.isfinite(grad).all() for grad in climbed.gradients)
    assert objective.telemetry.read()["non_finite"] > 0
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert scaler.get_scale() < 2.0**60
    model.zero_grad()
    step(objective, batch, autocast=torch.float16)
    expected = model_of(task, dtype=torch.float32)
    step(AdversarialObjective(expected, METHODS["freelb"]), batch, autocast=torch.float16)
    assert torch.equal(Gradients.of(model).flat(), Gradients.of(expected).flat())


@pytest.mark.parametrize("method", ["alum", "pgd"])
@every_task
def test_the_power_of_two_of_an_fp16_ascent_is_taken_out_exactly(method, task, monkeypatch):
    """Gradients without one are partly subnormal in fp16; two that keep them from that give the same bits."""
    found, climbed = [], Climbed(monkeypatch)
    for power in (1.0, 2.0**13, 2.0**15):
        for module in ("predictions", "step"):
            monkeypatch.setattr(f"alum_kernels.adversarial.{module}.FP16_GRAD_SCALE", power)
        model = model_of(task, dtype=torch.float32)
        step(AdversarialObjective(model, METHODS[method]), BATCHES[task](), autocast=torch.float16)
        found.append(climbed.gradients[0])
        climbed.gradients.clear()
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
    assert found[1].abs().max() > 0


@pytest.mark.parametrize("method", ["alum", "smart", "pgd", "low memory", "yopo", "llr"])
@every_task
def test_reentrant_checkpoints_are_refused_where_the_perturbation_alone_is_differentiated(method, task):
    config = METHODS.get(method) or getattr(AdversarialConfig, method)(fused_head=False)
    model = model_of(task, dtype=torch.float32)
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r"^model: expected layers checkpointed with use_reentrant=False.*enable"):
        AdversarialObjective(model, config).backward(BATCHES[task]())


@pytest.mark.parametrize("method", ["freelb", "fgm", "neftune", "r3f"])
@every_task
def test_reentrant_checkpoints_serve_whole_backwards(method, task):
    config, found = getattr(AdversarialConfig, method)(seed=SEED), []
    for checkpointed in (False, True):
        model = model_of(task, 0.2)
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": True})
        torch.manual_seed(5)
        AdversarialObjective(model, config).backward(BATCHES[task]())
        found.append(Gradients.of(model))
    assert_same(model, found[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["alum", "freelb", "low memory"])
@pytest.mark.parametrize("option", ["checkpointed", "bf16", "frozen"])
def test_options_of_a_compiled_model(method, option):
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = model_of("classification", dtype=torch.float32)
        if option == "checkpointed":
            model.activation_checkpointing_enable({"use_reentrant": False})
        if option == "frozen":
            frozen(model, "all embeddings")
        objective = AdversarialObjective(model, METHODS[method])
        if compiled:
            model.compile(backend="aot_eager")
        step(objective, BATCHES["classification"](), autocast=torch.bfloat16 if option == "bf16" else None)
        found.append(Gradients.of(model))
    assert found[0].flat().abs().max() > 1e-4
    assert_same(model, found[0], 2e-2 if option == "bf16" else 1e-4)
