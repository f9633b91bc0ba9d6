"""The drop-in for ``smart-pytorch`` against the package: values and gradients to twelve digits."""

import sys
from types import ModuleType

import pytest
import torch
from test_smart_pytorch_parity import AT_ONE_STEP, DIGITS, HIDDEN, LABELS, POSITIONS, SAMPLES, embeddings, weight
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alum_kernels.integrations import smart_pytorch as ours

theirs = pytest.importorskip("smart_pytorch", reason="needs smart-pytorch, of the extra 'peers'")

LOSSES = ("kl_loss", "sym_kl_loss", "js_loss")


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=DIGITS, atol=DIGITS * want.abs().max().item())


class Head(nn.Module):
    """From embeddings to logits, with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight())

    def forward(self, embeds: Tensor) -> Tensor:
        return torch.tanh(embeds).mean(-2) @ self.weight.T


def l2_norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True)


def run(package: ModuleType, loss_fn: str, last: str | None, shape: tuple[int, ...] | None = None, **options) -> tuple:
    """Loss, and its gradients to the embeddings and the head."""
    head, embeds = Head(), embeddings()
    embeds = (embeds if shape is None else embeds.view(shape)).requires_grad_()
    smart = package.SMARTLoss(
        head, getattr(package, loss_fn), None if last is None else getattr(package, last), **options
    )
    state = head(embeds)
    torch.manual_seed(7)
    loss = smart(embeds, state)
    loss.backward()
    return smart, loss.detach(), embeds.grad, head.weight.grad


def check(loss_fn: str, last: str | None, shape: tuple[int, ...] | None = None, fused: bool = True, **options) -> None:
    norms = {"inf_norm": (ours.inf_norm, theirs.smart_pytorch.inf_norm), "l2_norm": (l2_norm, l2_norm)}
    own, other = norms[options.pop("norm", "inf_norm")]
    smart, *found = run(ours, loss_fn, last, shape, norm_fn=own, **options)
    _, *expected = run(theirs, loss_fn, last, shape, norm_fn=other, **options)
    assert smart.fused == fused
    assert all(torch.isfinite(want).all() for want in expected)
    assert expected[1].abs().max() > 1e-8
    for got, want in zip(found, expected, strict=True):
        same(got, want)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize(
    ("loss_fn", "last"), [("kl_loss", "sym_kl_loss"), ("kl_loss", None), ("sym_kl_loss", "js_loss")]
)
def test_values_and_gradients(loss_fn, last, steps):
    if steps == 0:  # the package's own losses lose their digits at the noise; they have them at a larger one
        check(loss_fn, last, num_steps=steps, noise_var=1.0)
    else:
        check(loss_fn, last, num_steps=steps)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-2, 0.0])
@pytest.mark.parametrize("norm", ["inf_norm", "l2_norm"])
def test_norms_and_what_is_added(norm, epsilon):
    fused = norm == "inf_norm" and epsilon > 0
    check("kl_loss", "sym_kl_loss", fused=fused, norm=norm, epsilon=epsilon, num_steps=2, step_size=0.3, noise_var=1e-3)


@pytest.mark.parametrize("shape", [(SAMPLES * POSITIONS, 1, HIDDEN), (SAMPLES, 2, POSITIONS // 2, HIDDEN)], ids=str)
def test_embeddings_of_any_shape(shape):
    check("kl_loss", "sym_kl_loss", shape, num_steps=2)


def test_the_package_s_own_norm_runs_fused():
    smart = ours.SMARTLoss(Head(), ours.kl_loss, norm_fn=theirs.smart_pytorch.inf_norm)
    assert smart.fused
    assert not ours.SMARTLoss(Head(), ours.kl_loss, norm_fn=lambda x: ours.inf_norm(x)).fused


def test_the_package_s_losses_can_be_given():
    smart = ours.SMARTLoss(Head(), theirs.kl_loss, theirs.sym_kl_loss)
    embeds = embeddings()
    torch.manual_seed(7)
    same(smart(embeds, Head()(embeds)).detach(), torch.tensor(AT_ONE_STEP, dtype=torch.float64))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@pytest.mark.parametrize("alpha", [None, 1.0, 2.5])
@pytest.mark.parametrize("shape", [(5, LABELS), (2, 5, LABELS)], ids=str)
def test_losses(name, reduction, alpha, shape):
    if name == "kl_loss" and alpha is not None:
        return  # it has none
    options = {"reduction": reduction, **({} if alpha is None else {"alpha": alpha})}
    torch.manual_seed(1)
    pair = torch.randn(2, *shape, dtype=torch.float64) * 3
    results = []
    for package in (ours, theirs):
        a, b = (side.clone().requires_grad_() for side in pair)
        loss = getattr(package, name)(a, b, **options)
        (2.0 * loss).backward()
        results.append((loss.detach(), a.grad, torch.zeros_like(b) if b.grad is None else b.grad))
    for got, want in zip(*results, strict=True):
        same(got, want)


def test_default_reductions_are_the_package_s():
    torch.manual_seed(1)
    a, b = torch.randn(2, 5, LABELS, dtype=torch.float64)
    for name in LOSSES:
        same(getattr(ours, name)(a, b), getattr(theirs, name)(a, b))


@pytest.mark.parametrize("name", LOSSES)
def test_small_differences_keep_their_digits(name):
    """In fp32 at 1e-5, where the package's losses have none."""
    torch.manual_seed(1)
    b = torch.randn(64, LABELS)
    a = b + 1e-5 * torch.randn(64, LABELS)
    exact = getattr(ours, name)(a.double(), b.double())
    assert exact > 0
    torch.testing.assert_close(getattr(ours, name)(a, b).double(), exact, rtol=4e-6, atol=0)
    assert abs(getattr(theirs, name)(a, b).double() / exact - 1) > 1e-2


def test_a_token_whose_gradient_is_not_finite_takes_no_step():
    head, embeds = Head(), embeddings()

    def eval_fn(embed: Tensor) -> Tensor:
        if embed.requires_grad:
            embed.register_hook(
                lambda grad: grad.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(torch.nan).double())
            )
        return head(embed)

    torch.manual_seed(7)
    loss = ours.SMARTLoss(eval_fn, ours.kl_loss, ours.sym_kl_loss)(embeds, head(embeds))
    assert torch.isfinite(loss)
    assert loss > 0.1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_that_cannot_differentiate_to_embeddings_alone_are_named(reentrant):
    head, embeds = Head(), embeddings().requires_grad_()

    def checkpointed(embed: Tensor) -> Tensor:
        return checkpoint(head, embed, use_reentrant=reentrant)

    smart = ours.SMARTLoss(checkpointed, ours.kl_loss, ours.sym_kl_loss)
    torch.manual_seed(7)
    if not reentrant:
        same(smart(embeds, head(embeds)).detach(), torch.tensor(AT_ONE_STEP, dtype=torch.float64))
        return
    with pytest.raises(ValueError, match=r"^model: expected layers checkpointed with use_reentrant=False.*enable"):
        smart(embeds, head(embeds))


def test_a_state_of_no_embeddings_is_named():
    head, embeds = Head(), embeddings()
    smart = ours.SMARTLoss(lambda embed: head(embeds), ours.kl_loss, ours.sym_kl_loss)
    with pytest.raises(ValueError, match=r"^eval_fn: expected a function of the embeddings that it is given"):
        smart(embeds, head(embeds))


def test_it_runs_where_no_gradient_is_kept():
    head, embeds = Head(), embeddings()
    smart = ours.SMARTLoss(head, ours.kl_loss, ours.sym_kl_loss)
    torch.manual_seed(7)
    with torch.no_grad():
        loss = smart(embeds, head(embeds))
    same(loss, torch.tensor(AT_ONE_STEP, dtype=torch.float64))
    assert head.weight.grad is None


def test_half_precision_embeddings_have_a_perturbation_in_fp32():
    seen, losses = [], []

    def norm(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return ours.inf_norm(x)

    for norm_fn, dtype in ((ours.inf_norm, torch.float32), (ours.inf_norm, torch.bfloat16), (norm, torch.bfloat16)):
        head, embeds = Head().to(dtype), embeddings().to(dtype).requires_grad_()
        torch.manual_seed(7)
        loss = ours.SMARTLoss(head, ours.kl_loss, ours.sym_kl_loss, norm_fn=norm_fn)(embeds, head(embeds))
        loss.backward()
        assert loss.dtype == torch.float32
        assert embeds.grad.dtype == dtype
        losses.append(float(loss.detach()))
    assert seen == [torch.float32]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": -1}, "num_steps: expected a number >= 0, got -1"),
        ({"epsilon": -1e-6}, "epsilon: expected a finite number >= 0"),
        ({"noise_var": float("nan")}, "noise_var: expected a finite number >= 0"),
    ],
)
def test_constants_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        ours.SMARTLoss(Head(), ours.kl_loss, **options)


def test_single_terms_are_refused():
    with pytest.raises(ValueError, match="reduction: expected one of 'batchmean', 'sum', 'mean', got 'none'"):
        ours.kl_loss(torch.zeros(2, 3), torch.zeros(2, 3), reduction="none")


@pytest.mark.parametrize("model", ["tiny", pytest.param("bundled", marks=pytest.mark.slow)])
def test_the_example_runs(model, tiny_model, monkeypatch, capsys):
    from examples import smart_pytorch_drop_in

    own = ["--model", str(tiny_model)] if model == "tiny" else []
    monkeypatch.setattr(sys, "argv", ["smart_pytorch_drop_in", "--steps", "2", "--batch-size", "4", *own])
    smart_pytorch_drop_in.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(lines) == 2
    assert all(float(line.split("adversarial loss ")[1].split()[0]) > 0 for line in lines)
