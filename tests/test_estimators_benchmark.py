"""The benchmark of cheaper estimators: its statistics against sums written out, its gradients, and a small run."""

import json
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

pytest.importorskip("transformers")

from benchmarks import estimators
from benchmarks.estimator_statistics import EstimatorStatistics, Exact, FlatGradient, GradientMoments
from benchmarks.estimators import ESTIMATORS, EXACT, SAME, Regulariser, compare
from benchmarks.naive_step import standard_step
from benchmarks.shapes import Shape, minilm

PARAMETERS = 6


def tiny_model(task: str, folder=None, device=None, *, dropout: float = 0.1) -> torch.nn.Module:
    """Four layers, in float64."""
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 8}
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    config = BertConfig(**shape, **dict.fromkeys(names, dropout), initializer_range=0.3, num_labels=3)
    kind = BertForSequenceClassification if task == "classification" else BertForMaskedLM
    return kind(config).double().train()


# statistics


def draws(batches: int, seed: int, *, noise: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``batches`` batches: their means, which differ, and three draws around them, (n, P) float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(batches, PARAMETERS, dtype=torch.float64, generator=generator)

    means = 1 + 0.3 * normal()
    return means, *(means + noise * normal() for _ in range(3))


def result_of(estimates: Tensor, a: Tensor, b: Tensor, c: Tensor, period: int = 1) -> EstimatorStatistics:
    moments = GradientMoments(period)
    for estimate, other, same in zip(estimates, b, c, strict=True):
        moments.add(estimate, Exact(same, other, a.mean(0)))
    return moments.result()


def test_the_statistics_are_the_sums_written_out():
    _, a, b, c = draws(9, seed=0)
    estimates = 0.7 * c + torch.linspace(-1, 1, 9 * PARAMETERS, dtype=torch.float64).view(9, -1).sin()
    found = result_of(estimates, a, b, c)
    along, scale = [], (c.mean(0) * a.mean(0)).sum()
    for e_i, c_i in zip(estimates, c, strict=True):
        along.append(((e_i - c_i) * a.mean(0)).sum())
    bias = sum(along) / 9 / scale
    residuals = [x - bias * (c_i * a.mean(0)).sum() for x, c_i in zip(along, c, strict=True)]
    deviation = math.sqrt(sum(float(r) ** 2 for r in residuals) / 8)  # their mean is 0
    half = stats.t.ppf(0.975, 8) * deviation / 3 / scale
    pairs = sum((estimates[i] - c[i]) @ (estimates[j] - c[j]) for i in range(9) for j in range(9) if i != j)
    added = ((estimates - b) ** 2).sum() - ((c - b) ** 2).sum()
    cosines = torch.nn.functional.cosine_similarity(estimates, c).sort().values
    wanted = [bias, bias - half, bias + half, pairs / 72 / scale, added / (c**2).sum(), cosines[4]]
    got = [found.bias, found.low, found.high, found.squared, found.variance, found.cosine]
    torch.testing.assert_close(torch.tensor(got).double(), torch.stack([torch.as_tensor(w) for w in wanted]).double())
    assert found.units == 9


def test_a_known_bias_is_found():
    """An estimator 20 % too short, with noise of its own of half the length of each element."""
    means, a, b, c = draws(400, seed=1)
    own = 0.5 * torch.randn(400, PARAMETERS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = result_of(0.8 * means + own, a, b, c)
    assert found.low < -0.2 < found.high < -0.1
    assert not found.unbiased
    assert found.squared == pytest.approx(0.04, rel=0.3)
    # E|e|^2 falls by 0.36 E|m|^2, the cross term with b by 0.4: what is added is their difference
    size = (means**2).sum(1).mean()
    assert found.variance == pytest.approx(float(0.04 * size / (c**2).sum(1).mean()), abs=0.03)


def test_unbiased_estimators_are_called_so_at_the_rate_of_the_interval():
    """Twice the gradient or nothing, by a coin: added variance is the gradient's own square."""
    found = []
    for seed in range(100):
        means, a, b, c = draws(32, seed=seed)
        coin = torch.randint(2, (32, 1), generator=torch.Generator().manual_seed(1000 + seed)).double()
        found.append(result_of(2 * coin * (means + (c - means).flip(1)), a, b, c))
    assert 88 <= sum(one.unbiased for one in found) <= 99
    assert abs(sum(one.bias for one in found) / 100) < 0.05
    assert sum(one.variance for one in found) / 100 == pytest.approx(1, abs=0.1)
    assert abs(sum(one.squared for one in found) / 100) < 0.01


def test_a_direction_of_the_same_draw_would_show_a_bias_that_is_none():
    """Of another exact draw as the estimator: none along a, -Var(c_i) / n along c."""
    along_a, along_c = [], []
    for seed in range(400):
        _, a, b, c = draws(4, seed=seed, noise=3.0)
        along_a.append(float(((b - c) @ a.mean(0)).mean()))
        along_c.append(float(((b - c) @ c.mean(0)).mean()))
    variance = 9 * PARAMETERS / 4
    assert abs(sum(along_a) / 400) < 0.15 * variance
    assert sum(along_c) / 400 == pytest.approx(-variance, rel=0.15)


def test_a_period_counts_once_and_an_incomplete_one_not():
    _, a, b, c = draws(7, seed=5)
    on = (torch.arange(7) % 2 == 0).double().unsqueeze(1)
    found = result_of(2 * on * c, a, b, c, period=2)
    firsts, pairs = c[0:6:2], c[:6].view(3, 2, -1).mean(1)
    by_hand = ((firsts - pairs) @ a.mean(0)).mean() / (pairs @ a.mean(0)).mean()
    assert found.units == 3
    assert found.bias == pytest.approx(float(by_hand))
    with pytest.raises(ValueError, match="two periods of 4"):
        result_of(c, a, b, c, period=4)


# gradients


def flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten().clone() for parameter in model.parameters()])


@pytest.mark.parametrize("task", ["classification", "masked_lm"])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda one: f"{one.name}-{one.setting}")
def test_the_regulariser_is_the_step_without_the_task(estimator, task):
    """Without dropout: the clean pass of a part of the batch runs in two, with masks of its own."""
    model, batch = tiny_model(task, dropout=0.0), minilm(task, 4, 8).make_batch(torch.device("cpu"))
    values = FlatGradient(model).values
    regulariser = Regulariser(model, estimator)
    regulariser.add_gradient(batch, 0, SAME)
    alone = values.clone()
    regulariser.remove()

    class Whole(estimators.Estimator):
        def regulariser(self):
            return self.config()

    values.zero_()
    whole = Regulariser(model, Whole(**vars(estimator)))
    whole.add_gradient(batch, 0, SAME)
    together = values.clone()
    whole.remove()
    values.zero_()
    standard_step(model, batch)
    assert alone.norm() > 1e-6 * values.norm() > 0
    # float32 constants, and bfloat16 ascents, are the same in both
    assert (together - values - alone).norm() < 1e-8 * alone.norm() + 1e-12 * together.norm()


def test_gradients_are_a_function_of_batch_and_draw():
    model = tiny_model("classification")
    batch = minilm("classification", 4, 8).make_batch(torch.device("cpu"))
    values, regulariser = FlatGradient(model).values, Regulariser(model, ESTIMATORS[0])

    def gradient(index: int, draw: int) -> Tensor:
        values.zero_()
        regulariser.add_gradient(batch, index, draw)
        assert torch.equal(values, flat(model))
        return values.clone()

    first = gradient(0, SAME)
    assert torch.equal(first, gradient(0, SAME))
    assert not torch.allclose(first, gradient(0, SAME + 1))
    assert not torch.allclose(first, gradient(1, SAME))


def test_what_estimators_do_to_a_small_model():
    batches = [minilm("classification", 4, 8).make_batch(torch.device("cpu"), seed=seed) for seed in range(20)]
    chosen = [one for one in ESTIMATORS if one.name != "ascent_dtype"]
    found, noise = compare(tiny_model("classification"), chosen, batches[:16], batches[16:])
    by_name = {(one.name, one.setting): result for one, result in zip(chosen, found, strict=True)}
    assert 0 < noise < 1
    assert by_name["adversarial_interval", "4"].units == 4
    # the gradient of a period's first step, as long as that of all of them: three times its square is added
    assert by_name["adversarial_interval", "4"].variance > by_name["adversarial_interval", "2"].variance > 0
    assert not by_name["noise_only", "steps 0"].unbiased
    assert by_name["noise_only", "steps 0"].bias < -0.1, "nothing was climbed"
    assert by_name["adversarial_fraction", "0.25"].variance > by_name["adversarial_fraction", "0.5"].variance


# the program


@pytest.mark.parametrize("task", ["classification", "masked_lm"])
def test_a_small_run(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Shape, "make_model", lambda shape, device: tiny_model(shape.task))
    path = tmp_path / "found.json"
    sizes = ["--batches", "8", "--batch", "4", "--length", "8", "--rounds", "1", "--steps-between", "1"]
    only = ["--only", "adversarial_fraction", "adversarial_interval", "delta_lifetime"]
    assert estimators.main([*sizes, *only, "--task", task, "--device", "cpu", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert (written["benchmark"], written["batches"]) == ("estimators", 8)
    assert written["config"] == EXACT.to_dict()
    rows = written["results"]
    assert [(row["estimator"], row["setting"]) for row in rows] == [
        ("exact", "another draw"),
        ("adversarial_fraction", "0.5"),
        ("adversarial_fraction", "0.25"),
        ("adversarial_interval", "2"),
        ("adversarial_interval", "4"),
        ("delta_lifetime", "2"),
    ]
    bounds = [8 / 3, 1 + 5 / 6, 1 + 5 / 12, 1 + 5 / 6, 1 + 5 / 12, 1 + 4 / 3]
    assert [row["cost_bound"] for row in rows] == pytest.approx(bounds)
    printed = capsys.readouterr().out
    for row in rows:
        assert row["task"] == task
        assert row["batches"] == 8
        assert row["bias_low"] <= row["bias"] <= row["bias_high"]
        assert row["unbiased"] is (row["bias_low"] <= 0 <= row["bias_high"])
        assert row["cost"] > 0
        assert -1 <= row["cosine"] <= 1
        assert all(math.isfinite(row[name]) for name in ("bias_squared", "variance", "exact_variance"))
        assert row["changes"].endswith(".")
        assert f"{row['bias']:+.4f}" in printed


def test_too_few_batches_are_refused(capsys):
    with pytest.raises(SystemExit):
        estimators.main(["--batches", "7"])
    assert "expected 8 at the least" in capsys.readouterr().err
