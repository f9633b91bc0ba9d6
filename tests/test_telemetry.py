"""The figures of the adversary against hand computations, and the warning about rounding noise."""

import warnings

import pytest
import tiny_models
import torch
from tiny_models import BagOfEmbeddings
from torch import nn

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.adversarial.telemetry import Telemetry
from alum_kernels.backends.reference import noise_init as reference_noise
from alum_kernels.backends.reference import projected_ascent as reference_ascent
from alum_kernels.backends.reference import symmetric_kl as reference_kl

MOVED = AdversarialConfig(std=1e-2, step_size=2e-2, epsilon=2e-2, normalize="linf", modules=("embed",))


def bag(config: AdversarialConfig, dtype: torch.dtype = torch.float64) -> AdversarialObjective:
    return AdversarialObjective(
        BagOfEmbeddings().to(dtype),
        config,
        head="classification",
        loss=lambda logits, batch: nn.functional.cross_entropy(logits, batch["labels"]),
    )


def rows(adv_logits, logits, divergence="symmetric_kl"):
    return reference_kl.loss(adv_logits, logits, None, divergence=divergence, inv_temperature=1.0)[0]


@pytest.mark.parametrize("ascent_divergence", ["symmetric_kl", "kl"])
def test_figures_of_a_step_computed_by_hand(ascent_divergence):
    config = MOVED.replace(ascent_divergence=ascent_divergence)
    objective, batch, seed = bag(config), tiny_models.classification_batch(), torch.tensor([5])
    model, mask = objective.model, batch["attention_mask"]
    objective.forward(batch, seed=seed)
    figures = objective.telemetry.read()

    std, step_size, epsilon = torch.tensor([1e-2, 2e-2, 2e-2]).tolist()
    clean = model.embed(batch["input_ids"]).detach()
    logits = model.body(clean, mask).detach()
    noise = {"std": std, "mask": mask, "distribution": "normal", "stream": 0, "sample_offset": 0}
    start = reference_noise.initial_delta(clean.shape, seed, torch.float64, **noise)
    point = (clean + start).requires_grad_()
    at_start = rows(model.body(point, mask), logits, ascent_divergence).sum()
    (grad,) = torch.autograd.grad(at_start, point)
    options = {"step_size": step_size, "normalize": "linf", "level": "token", "mask": mask}
    _, free, _ = reference_ascent.projected_ascent(clean, grad, start, epsilon=epsilon, norm="none", **options)
    delta = free.clamp(-epsilon, epsilon)
    adv_logits = model.body(clean + delta, mask)

    elements = mask.sum().item() * clean.shape[2]
    expected = {
        "divergence": rows(adv_logits, logits).mean().item(),
        "ascent_gain": (rows(adv_logits, logits, ascent_divergence).sum() / at_start).item(),
        "delta_rms": ((delta**2).sum() / elements).sqrt().item(),
        "clipped": ((delta != free) & (mask.unsqueeze(-1) == 1)).sum().item() / elements,
        "unrepresentable": 0.0,
        "non_finite": 0.0,
    }
    assert figures == pytest.approx(expected, rel=1e-6)
    assert 0.05 < figures["clipped"] < 0.95
    assert figures["ascent_gain"] > 1.2


def test_reading_averages_over_the_steps_since_the_last():
    objective, batch = bag(MOVED), tiny_models.classification_batch()
    assert objective.telemetry.read() == {}
    single = [objective(**batch).divergence.item() for _ in range(3)]
    assert objective.telemetry.read()["divergence"] == pytest.approx(sum(single) / 3, rel=1e-6)
    assert objective.telemetry.read() == {}
    alone = objective(**batch).divergence.item()
    assert objective.telemetry.read()["divergence"] == pytest.approx(alone, rel=1e-6)


def test_steps_without_an_adversary_do_not_dilute_its_figures():
    model = tiny_models.bert()
    config = AdversarialConfig(normalize="linf", std=1e-2, epsilon=1e-2, step_size=1e-2, start=2, proximal=1.0)
    objective = AdversarialObjective(model, config)
    objective.follow(torch.optim.SGD(model.parameters(), lr=0.1))
    divergences = [objective(**tiny_models.classification_batch()).divergence.item() for _ in range(4)]
    assert divergences[:2] == [0, 0]
    assert objective.telemetry.read()["divergence"] == pytest.approx(sum(divergences) / 2, rel=1e-6)


def test_sums_become_ratios():
    telemetry = Telemetry()
    for start, end in ((1.0, 3.0), (2.0, 9.0)):
        telemetry.add(
            **{
                name: torch.tensor(value)
                for name, value in {
                    "divergence": 0.5,
                    "start": start,
                    "end": end,
                    "elements": 8.0,
                    "delta_squared": 2.0,
                    "clipped": 4.0,
                    "unrepresentable": 2.0,
                    "non_finite": 3.0,
                }.items()
            }
        )
    assert telemetry.read() == {
        "divergence": 0.5,
        "ascent_gain": 4.0,
        "delta_rms": 0.5,
        "clipped": 0.5,
        "unrepresentable": 0.25,
        "non_finite": 3.0,
    }


def test_noise_alone_has_no_gain_and_telemetry_can_be_off():
    batch = tiny_models.classification_batch()
    noise = bag(MOVED.replace(steps=0))
    noise(**batch)
    assert set(noise.telemetry.read()) == {"divergence"}
    silent = bag(MOVED.replace(telemetry=False))
    silent(**batch)
    assert silent.telemetry.read() == {}
    checked = bag(MOVED.replace(telemetry=False, signal_check_interval=1))
    checked(**batch)
    assert set(checked.telemetry.read()) == {"signal_ratio"}


def test_a_gradient_that_is_not_finite_is_counted_and_not_climbed():
    class Poisoned(BagOfEmbeddings):
        passes = 0

        def body(self, embeds, attention_mask):
            self.passes += 1
            if self.passes == 2:  # the ascent's, between the clean and the final one
                scale = torch.ones_like(embeds)
                embeds.register_hook(lambda grad: torch.where(torch.arange(grad.shape[2]) < 2, torch.inf, grad * scale))
            return super().body(embeds, attention_mask)

    objective = AdversarialObjective(
        Poisoned(),
        MOVED,
        head="classification",
        loss=lambda logits, batch: nn.functional.cross_entropy(logits, batch["labels"]),
    )
    batch = tiny_models.classification_batch()
    objective(**batch).loss.backward()
    figures = objective.telemetry.read()
    assert figures["non_finite"] == 2 * batch["attention_mask"].sum()
    assert figures["ascent_gain"] < 1.01
    assert all(torch.isfinite(parameter.grad).all() for parameter in objective.model.parameters())


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_the_signal_ratio_of_a_smooth_divergence_is_four(steps):
    objective = bag(MOVED.replace(std=1e-4, epsilon=1e-3, step_size=1e-3, steps=steps, signal_check_interval=2))
    batch = tiny_models.classification_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective(**batch)
        assert "signal_ratio" not in objective.telemetry.read()
        objective(**batch)
        assert objective.telemetry.read()["signal_ratio"] == pytest.approx(4.0, abs=0.01)


@pytest.mark.parametrize(("dtype", "size", "drowned"), [(torch.float32, 1e-4, False), (torch.bfloat16, 1e-5, True)])
def test_rounding_noise_is_warned_of_once(dtype, size, drowned):
    model, batch = tiny_models.bert().to(dtype), tiny_models.classification_batch(32)
    config = MOVED.replace(std=size, epsilon=size, step_size=size, modules=(), signal_check_interval=1)
    objective = AdversarialObjective(model, config)

    def read() -> dict[str, float]:
        for _ in range(8):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                objective(**batch)
        return objective.telemetry.read()

    with pytest.warns(UserWarning, match="epsilon lies in the rounding noise of the training precision") as caught:
        figures = read()
    assert len(caught) == 1
    assert figures["signal_ratio"] < 2
    assert (figures["signal_ratio"] == 0) == drowned
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read()["signal_ratio"] < 2
