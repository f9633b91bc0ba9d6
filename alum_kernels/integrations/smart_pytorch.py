"""``SMARTLoss`` and the losses of the package ``smart-pytorch`` 0.0.4 on fused ops: the same calls, the same numbers.

    from alum_kernels.integrations.smart_pytorch import SMARTLoss, kl_loss, sym_kl_loss    # was: from smart_pytorch

    delta_0 = noise_var N(0, 1)                                    noise_var is a standard deviation, as there
    K times   g = d loss_fn(f(e + delta), s) / d delta             s, the state, held constant
              delta <- (delta + step_size g) / (norm_fn(delta + step_size g) + epsilon)
    result    loss_last_fn(f(e + delta), s)

The noise is the same draw of ``torch.randn_like``, so a seeded run has the package's perturbation. What differs:
small perturbations keep their digits, a token whose gradient is not finite takes no step (there it becomes NaN), delta
is fp32 for half-precision embeddings, and ``torch.no_grad()`` is no obstacle.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from alum_kernels.adversarial.input_gradients import input_gradients
from alum_kernels.integrations.rescaled_ascent import rescaled_ascent
from alum_kernels.ops.checks import check_choice, check_count, check_magnitude
from alum_kernels.ops.symmetric_kl import kl, symmetric_kl

Loss = Callable[[Tensor, Tensor], Tensor]

REDUCTIONS = ("batchmean", "sum", "mean")


def inf_norm(x: Tensor) -> Tensor:
    """(..., 1) largest magnitude over the last dimension of ``x`` (..., H)."""
    return x.abs().amax(-1, keepdim=True)


class SMARTLoss(nn.Module):
    """SMART's regulariser: how far a prediction moves when its embeddings are perturbed against it.

    Args:
        eval_fn: from embeddings, in the shape of ``embed``, to the state (the logits).
        loss_fn: ``loss_fn(perturbed_state, state)``, which the perturbation climbs.
        loss_last_fn: likewise, the loss that is returned; None takes ``loss_fn``.
        norm_fn: what a perturbation is divided by, from (..., H) to (..., 1). :func:`inf_norm` and the package's own
            run fused (``fused`` says so); any other function runs as it is written.
        num_steps: K.
        step_size: factor on the gradient.
        epsilon: added to the norm.
        noise_var: standard deviation of the noise.

    Raises:
        TypeError, ValueError: a constant of the wrong type or sign; the message names it.

    Source: the package ``smart-pytorch`` 0.0.4, after Jiang et al., arXiv:1911.03437.

    Example:
        >>> import torch
        >>> from alum_kernels.integrations.smart_pytorch import SMARTLoss, kl_loss, sym_kl_loss
        >>> head = torch.nn.Linear(8, 3)
        >>> def eval_fn(embed):
        ...     return head(embed.tanh().mean(1))
        >>> smart = SMARTLoss(eval_fn, kl_loss, sym_kl_loss)
        >>> embed = torch.randn(4, 6, 8, requires_grad=True)
        >>> loss = smart(embed, eval_fn(embed))
        >>> loss.backward()
        >>> bool(loss > 0), embed.grad.shape
        (True, torch.Size([4, 6, 8]))
    """

    def __init__(
        self,
        eval_fn: Callable[[Tensor], Tensor],
        loss_fn: Loss,
        loss_last_fn: Loss | None = None,
        norm_fn: Callable[[Tensor], Tensor] = inf_norm,
        num_steps: int = 1,
        step_size: float = 1e-3,
        epsilon: float = 1e-6,
        noise_var: float = 1e-5,
    ) -> None:
        super().__init__()
        check_count("num_steps", num_steps)
        for name, value in (("step_size", step_size), ("epsilon", epsilon), ("noise_var", noise_var)):
            check_magnitude(name, value)
        self.eval_fn, self.loss_fn = eval_fn, loss_fn
        self.loss_last_fn = loss_fn if loss_last_fn is None else loss_last_fn
        self.norm_fn, self.num_steps = norm_fn, num_steps
        self.step_size, self.epsilon, self.noise_var = step_size, epsilon, noise_var

    @property
    def fused(self) -> bool:
        """Whether the ascent runs as one op: the norm is the infinity norm, and something is added to it."""
        own = self.norm_fn is inf_norm
        theirs = (getattr(self.norm_fn, "__module__", None), getattr(self.norm_fn, "__name__", None)) == (
            "smart_pytorch.smart_pytorch",
            "inf_norm",
        )
        return (own or theirs) and self.epsilon > 0

    def forward(self, embed: Tensor, state: Tensor) -> Tensor:
        """The loss, differentiable to ``embed``, to ``state`` and to what ``eval_fn`` is made of.

        Args:
            embed: (..., H) embeddings.
            state: ``eval_fn(embed)``.

        Raises:
            ValueError: what ``eval_fn`` returns does not depend on its embeddings, or it has layers that are
                checkpointed with ``use_reentrant=True``.
        """
        delta = torch.randn_like(embed, dtype=torch.promote_types(embed.dtype, torch.float32)) * self.noise_var
        perturbed = _moved(embed, delta)
        for _ in range(self.num_steps):
            leaf = perturbed.detach().requires_grad_()
            with torch.enable_grad():  # of a copy, which the function may change in place
                loss = self.loss_fn(self.eval_fn(leaf.clone()), state.detach())
            (grad,) = input_gradients(loss, [leaf], None)
            if grad is None:
                raise ValueError("eval_fn: expected a function of the embeddings that it is given, got one of none")
            perturbed, delta = self._ascend(embed, grad, delta)
        return self.loss_last_fn(self.eval_fn(perturbed), state)

    def _ascend(self, embed: Tensor, grad: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings at the next perturbation, and that perturbation."""
        if not self.fused:
            step = delta + self.step_size * grad
            delta = step / (self.norm_fn(step) + self.epsilon)
            return _moved(embed, delta), delta
        perturbed, delta = rescaled_ascent(
            _tokens(embed), _tokens(grad), _tokens(delta), step_size=self.step_size, epsilon=self.epsilon
        )
        return perturbed.view_as(embed), delta.view_as(embed)


def _moved(embed: Tensor, delta: Tensor) -> Tensor:
    """embed + delta in the perturbation's precision, rounded once to that of the embeddings."""
    return (embed + delta).to(embed.dtype)


def _tokens(tensor: Tensor) -> Tensor:
    """(..., H) as (1, N, H), unless it is (B, S, H)."""
    return tensor if tensor.dim() == 3 else tensor.reshape(1, -1, tensor.shape[-1])


def kl_loss(input: Tensor, target: Tensor, reduction: str = "batchmean") -> Tensor:  # noqa: A002
    """KL(softmax(target) || softmax(input)) of (..., V) logits, both sides differentiable.

    Args:
        input, target: logits of the perturbed and of the clean prediction.
        reduction: ``"batchmean"`` (over the first dimension), ``"sum"`` or ``"mean"`` (over elements, as there). The
            package's ``"none"`` is refused: single terms are never formed.

    Raises:
        TypeError, ValueError: as :func:`alum_kernels.kl`, or another reduction.
    """
    return _reduced(kl(input, target, reduction="sum"), input, reduction)


def sym_kl_loss(input: Tensor, target: Tensor, reduction: str = "sum", alpha: float = 1.0) -> Tensor:  # noqa: A002
    """alpha KL(q || p) + KL(p || q) with p = softmax(input), q = softmax(target), the first of each held constant.

    Takes arguments as :func:`kl_loss` does, and ``alpha``.
    """
    if alpha == 1.0:
        total = symmetric_kl(input, target, reduction="sum", gradient="detach_targets")
    else:
        sides = {"reduction": "sum", "gradient": "detach_clean"}
        total = alpha * kl(input, target, **sides) + kl(target, input, **sides)
    return _reduced(total, input, reduction)


def js_loss(input: Tensor, target: Tensor, reduction: str = "sum", alpha: float = 1.0) -> Tensor:  # noqa: A002
    """alpha (KL(m || p) + KL(m || q)), m = (p + q) / 2 held constant; arguments as :func:`kl_loss`.

    That is not the Jensen-Shannon divergence, whose KLs are those from m: :func:`alum_kernels.js` is. Computed in fp64,
    where rounding m costs nothing.
    """
    p_logits, q_logits = input.double(), target.double()
    middle = torch.logaddexp(p_logits.log_softmax(-1), q_logits.log_softmax(-1)).detach()
    sides = {"reduction": "sum", "gradient": "detach_clean"}
    total = kl(p_logits, middle, **sides) + kl(q_logits, middle, **sides)
    return _reduced(alpha * total, input, reduction).to(torch.promote_types(input.dtype, torch.float32))


def _reduced(total: Tensor, logits: Tensor, reduction: str) -> Tensor:
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "sum":
        return total
    return total / (logits.shape[0] if reduction == "batchmean" else logits.numel())
