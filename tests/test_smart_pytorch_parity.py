"""SMART as the PyPI package ``smart-pytorch`` 0.0.4 computes it, to twelve digits.

Its rule, of the K steps from noise N(0, noise_var^2):

    g = d loss_fn(f(e + delta), sg f(e)) / d delta         loss_fn: kl_loss, KL(f(e) || f(e + delta)), mean over samples
    delta <- (delta + step_size g) / (max|delta + step_size g| + 1e-6)       per token, over the last dimension
    result = loss_last_fn(f(e + delta), f(e))              sym_kl_loss: summed, each side's target detached

Ours with the same result: ``norm="linf_rescale"``, ``normalize="none"``, ``level="token"``,
``ascent_divergence="kl"``, ``divergence="symmetric_kl"``, ``gradient="detach_targets"``; ``step_size`` over the number
of samples, since an ascent climbs the sum over them; and the number of samples times the divergence, which is a mean.
"""

import pytest
import torch
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective, projected_ascent, symmetric_kl, symmetric_kl_grad

smart_pytorch = pytest.importorskip("smart_pytorch", reason="needs smart-pytorch, of the extra 'peers'")

DIGITS = 1e-12
SAMPLES, POSITIONS, HIDDEN, LABELS = 2, 4, 8, 3
AT_ONE_STEP = 0.790343173286401


def weight() -> Tensor:
    return torch.linspace(-1, 1, LABELS * HIDDEN, dtype=torch.float64).view(LABELS, HIDDEN)


def embeddings() -> Tensor:
    return torch.linspace(-0.5, 0.5, SAMPLES * POSITIONS * HIDDEN, dtype=torch.float64).view(-1, POSITIONS, HIDDEN)


def logits_of(embeds: Tensor) -> Tensor:
    return torch.tanh(embeds).mean(1) @ weight().T


def delta_0() -> Tensor:
    """What the package draws first after ``manual_seed(7)``."""
    torch.manual_seed(7)
    return torch.randn_like(embeddings()) * 1e-5


def theirs(steps: int, step_size: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Their loss and its gradient to the embeddings."""
    embeds = embeddings().requires_grad_()
    loss = smart_pytorch.SMARTLoss(
        logits_of,
        smart_pytorch.kl_loss,
        smart_pytorch.sym_kl_loss,
        num_steps=steps,
        step_size=step_size,
        epsilon=1e-6,
        noise_var=1e-5,
    )
    torch.manual_seed(7)
    value = loss(embeds, logits_of(embeds))
    value.backward()
    return value.detach(), embeds.grad


class Classifier(nn.Module):
    """Each position of the batch has an embedding of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(embeddings().view(-1, HIDDEN), freeze=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return logits_of(self.embed(input_ids))


def test_their_own_figure():
    assert abs(theirs(1)[0].item() - AT_ONE_STEP) < 1e-15


@pytest.mark.parametrize("steps", [1, 3])
def test_the_ops_agree(steps):
    embeds, delta = embeddings(), delta_0()
    clean = logits_of(embeds)
    for _ in range(steps):
        point = (embeds + delta).requires_grad_()
        adv = logits_of(point)
        _, upstream = symmetric_kl_grad(adv.detach(), clean, divergence="kl", reduction="batchmean")
        (grad,) = torch.autograd.grad(adv, point, upstream)
        _, delta = projected_ascent(
            embeds, grad, delta, step_size=1e-3, epsilon=0.0, norm="linf_rescale", level="token", return_delta=True
        )
    live = embeds.clone().requires_grad_()
    loss = symmetric_kl(logits_of(live + delta), logits_of(live), reduction="sum", gradient="detach_targets")
    loss.backward()
    value, gradient = theirs(steps)
    torch.testing.assert_close(loss.detach(), value, rtol=DIGITS, atol=0)
    torch.testing.assert_close(live.grad, gradient, rtol=DIGITS, atol=DIGITS * gradient.abs().max().item())


@pytest.mark.parametrize("steps", [1, 3])
def test_the_objective_agrees(steps):
    step_size = 2.0**-10  # as near to 1e-3 as a number that fp32 has exactly, like the constants of an objective
    config = AdversarialConfig(
        steps=steps,
        step_size=step_size / SAMPLES,
        norm="linf_rescale",
        ascent_divergence="kl",
        gradient="detach_targets",
        alpha=SAMPLES,
        clean_weight=0.0,
        modules=("embed",),
    )
    model = Classifier()
    objective = AdversarialObjective(model, config, head="classification", loss=lambda logits, batch: logits.sum())
    output = objective.forward({"input_ids": torch.arange(SAMPLES * POSITIONS).view(SAMPLES, -1)}, delta=[delta_0()])
    output.loss.backward()
    value, gradient = theirs(steps, step_size)
    torch.testing.assert_close(output.loss.detach(), value, rtol=DIGITS, atol=0)
    torch.testing.assert_close(
        model.embed.weight.grad.view_as(gradient), gradient, rtol=DIGITS, atol=DIGITS * gradient.abs().max().item()
    )


def test_the_preset_of_the_official_code_has_their_figure():
    """With the published step, which fp32 rounds."""
    config = AdversarialConfig.mtdnn(step_size=1e-3 / SAMPLES, modules=("embed",))
    objective = AdversarialObjective(
        Classifier(), config, head="classification", loss=lambda logits, batch: logits.sum()
    )
    output = objective.forward({"input_ids": torch.arange(SAMPLES * POSITIONS).view(SAMPLES, -1)}, delta=[delta_0()])
    torch.testing.assert_close(SAMPLES * output.divergence.item(), AT_ONE_STEP, rtol=1e-9, atol=0)
    # not the clip of the paper, whose perturbation is 1e-5
    clipped = AdversarialObjective(
        Classifier(), config.replace(norm="linf"), head="classification", loss=lambda logits, batch: logits.sum()
    )
    small = clipped.forward({"input_ids": torch.arange(SAMPLES * POSITIONS).view(SAMPLES, -1)}, delta=[delta_0()])
    assert small.divergence < 1e-8 * AT_ONE_STEP
