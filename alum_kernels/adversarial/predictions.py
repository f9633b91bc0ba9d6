"""What one pass of a model predicted, and the divergence between two passes, through logits or a linear head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alum_kernels.adversarial.config import AdversarialConfig
from alum_kernels.adversarial.gathering_units import Result
from alum_kernels.adversarial.heads import Head
from alum_kernels.adversarial.input_gradients import input_gradients
from alum_kernels.adversarial.linear_head import Captured, LinearHead
from alum_kernels.ops.linear_ascent import linear_products, linear_symmetric_kl_grad
from alum_kernels.ops.linear_symmetric_kl import linear_kl, linear_symmetric_kl

FP16_GRAD_SCALE = 2.0**10
"""Factor on the inner gradient of fp16 predictions, taken out again exactly: p - q at 1e-5 would be subnormal in fp16.
The gradient itself may be as large as 63."""

_LINEAR_DIVERGENCES = {"symmetric_kl": linear_symmetric_kl, "kl": linear_kl}


@dataclass(frozen=True)
class Prediction:
    """One head's prediction in one pass.

    Attributes:
        head: how it is compared.
        values: logits (..., V); or, with ``linear``, the hidden states (N, H) of the compared rows.
        mask: which rows are compared, None for all.
        linear: the projection that would turn hidden states into logits.
        captured: what that projection was given.
        products: of the clean side: its products with the projection, where they are kept over an ascent.
    """

    head: Head
    values: Tensor
    mask: Tensor | None = None
    linear: LinearHead | None = None
    captured: Captured | None = None
    products: Tensor | None = None

    def detached(self) -> "Prediction":
        return replace(self, values=self.values.detach())

    def like(self, other: "Prediction") -> "Prediction":
        """The same values in the dtype of another pass's, and projected as there; differentiable."""
        captured = None if other.captured is None else replace(self.captured, autocast=other.captured.autocast)
        return replace(self, values=self.values.to(other.values.dtype), captured=captured)

    def with_products(self) -> "Prediction":
        """The same with the clean products kept, where they fit the budget of a chunk."""
        if self.linear is None:
            return self
        with self.linear.autocast(self.captured):
            products = self.linear.gathered(lambda: linear_products(self.values, self.linear.projection.weight))
        return replace(self, products=products)

    def rows(self) -> Tensor | int:
        """How many rows are compared."""
        return self.values.shape[:-1].numel() if self.mask is None else self.mask.sum()


def where_gathered(predictions: Sequence[Prediction], work: Callable[[], Result]) -> Result:
    """What ``work`` returns, which uses the linear head of these predictions, if there is one, and its parameters."""
    part = next((part for part in predictions if part.linear is not None), None)
    return work() if part is None else part.linear.gathered(work, part.captured.hidden)


def mean_divergences(
    adv: Sequence[Prediction], clean: Sequence[Prediction], config: AdversarialConfig, *, gradient: str | None = None
) -> Tensor:
    """(heads,) divergence of each head, the mean over its compared rows; differentiable, by the config's convention."""
    pairs = zip(adv, clean, strict=True)
    return torch.stack([_reduced(a, c, config, config.divergence, "mean", gradient) for a, c in pairs])


def _reduced(
    adv: Prediction,
    clean: Prediction,
    config: AdversarialConfig,
    divergence: str,
    reduction: str,
    gradient: str | None = None,
) -> Tensor:
    options = {
        "reduction": reduction,
        "gradient": config.gradient if gradient is None else gradient,
        "temperature": config.temperature,
        "backend": config.backend,
    }
    if adv.linear is None:
        return adv.head.divergence(adv.values, clean.values, clean.mask, divergence=divergence, **options)
    head = adv.linear

    def divergence_of_rows() -> Tensor:
        return _LINEAR_DIVERGENCES[divergence](
            adv.values,
            clean.values,
            head.projection.weight,
            head.projection.bias,
            logit_scale=head.logit_scale,
            soft_cap=head.soft_cap,
            mask=adv.mask,
            gather_rows=False,
            **options,
        )

    with head.autocast(adv.captured):
        return head.gathered(divergence_of_rows, adv.captured.hidden)


def in_fp16(tensor: Tensor) -> bool:
    """Whether a pass that this tensor belongs to computes in fp16."""
    device = tensor.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return autocast or tensor.dtype == torch.float16


def divergence_sum(
    adv: Sequence[Prediction], clean: Sequence[Prediction], config: AdversarialConfig, divergence: str
) -> Tensor:
    """The divergence of each head, summed over compared rows and heads; no graph."""
    with torch.no_grad():
        return torch.stack([_reduced(a, c, config, divergence, "sum") for a, c in zip(adv, clean, strict=True)]).sum()


def sum_and_gradients(
    adv: Sequence[Prediction],
    clean: Sequence[Prediction],
    inputs: Sequence[Tensor],
    config: AdversarialConfig,
    divergence: str,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The divergence summed over the rows of each head, and its gradient to ``inputs`` through the adversarial pass.

    No parameter gets one. Gradients of fp16 passes are fp32, with the factor that kept them apart from zero taken out.
    """
    scale = FP16_GRAD_SCALE if any(in_fp16(a.values) for a in adv) else 1.0
    adv = [a.like(c) for a, c in zip(adv, clean, strict=True)]  # an ascent in another precision than the clean pass
    sums, grad_values = zip(
        *(_sum(a, c, config, divergence, scale) for a, c in zip(adv, clean, strict=True)), strict=True
    )
    grads = input_gradients([a.values for a in adv], inputs, grad_values)
    if scale != 1.0:
        grads = [None if grad is None else grad.float() / scale for grad in grads]
    return list(sums), list(grads)


def _sum(
    adv: Prediction, clean: Prediction, config: AdversarialConfig, divergence: str, grad_scale: float
) -> tuple[Tensor, Tensor]:
    options = {"divergence": divergence, "temperature": config.temperature, "backend": config.backend}
    if adv.linear is None:
        return adv.head.divergence_and_gradient(
            adv.values, clean.values.detach(), clean.mask, grad_scale=grad_scale, **options
        )
    head = adv.linear

    def sum_and_gradient() -> tuple[Tensor, Tensor]:
        return linear_symmetric_kl_grad(
            adv.values,
            clean.values,
            head.projection.weight,
            head.projection.bias,
            reduction="sum",
            logit_scale=head.logit_scale,
            soft_cap=head.soft_cap,
            mask=adv.mask,
            gather_rows=False,
            clean_products=clean.products,
            grad_scale=grad_scale,
            **options,
        )

    with head.autocast(adv.captured):
        return head.gathered(sum_and_gradient, adv.captured.hidden)
