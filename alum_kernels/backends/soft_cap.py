"""Soft-capped logits, cap tanh(z / cap), on both sides of a linear divergence (Gemma 2, arXiv:2408.00118, section 2).

With z_b the clean product and bias, z_d its difference from the adversarial one, both over the cap, and t = tanh:

    b = cap t(z_b)              a - b = cap sinh(z_d) / (cosh z_a cosh z_b)
    dJ/dz_d = G_a / cosh^2 z_a  dJ/dz_b = S / cosh^2 z_b - G_a (t_a - t_b) (t_a + t_b)     S = dJ/da + dJ/db

with 1 / cosh x = 2 e^-|x| / (1 + e^-2|x|): no difference of two tanh and no 1 - tanh^2, which have no digits left where
the cap saturates. Plain PyTorch on every backend: a few passes over a chunk, on whatever device it lies.
"""

import torch
from torch import Tensor


def finished_logits(products: Tensor, scale: float, cap: float | None) -> Tensor:
    """Logits of products to which the bias has been added: scaled, and capped unless ``cap`` is None."""
    scaled = products if scale == 1.0 else products * scale
    return scaled if cap is None else cap * torch.tanh(scaled / cap)


def _change_of_tanh(difference: Tensor, clean: Tensor) -> Tensor:
    """t(clean + difference) - t(clean). |difference| <= |adversarial| + |clean|, so that no exponent is positive.

    2 sinh is written for either sign, so that it has its derivative at zero too: a class of zero weight stays there.
    """
    adv, of_clean, up = (clean + difference).abs(), clean.abs(), difference >= 0
    rise, fall = torch.where(up, difference, 0), torch.where(up, 0, difference)
    risen = -torch.expm1(-2 * rise) * torch.exp(rise - adv - of_clean)
    fallen = torch.expm1(2 * fall) * torch.exp(-fall - adv - of_clean)
    return 2 * torch.where(up, risen, fallen) / ((1 + torch.exp(-2 * adv)) * (1 + torch.exp(-2 * of_clean)))


def _slope(x: Tensor) -> Tensor:
    """1 / cosh^2 x."""
    decay = torch.exp(-2 * x.abs())
    return 4 * decay / (1 + decay) ** 2


def soft_cap(difference: Tensor, clean: Tensor, cap: float, scale: float) -> tuple[Tensor, Tensor]:
    """(a - b, b) of capped logits from products ``difference`` and ``clean``, both times ``scale`` before the cap."""
    difference, clean = difference * (scale / cap), clean * (scale / cap)
    return cap * _change_of_tanh(difference, clean), cap * torch.tanh(clean)


def uncap_gradients(
    grad_a: Tensor, grad_sum: Tensor | None, difference: Tensor, clean: Tensor, cap: float, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Gradients to the products that :func:`soft_cap` was given, from those to the capped logits that it gave."""
    difference, clean = difference * (scale / cap), clean * (scale / cap)
    adv = clean + difference
    if grad_sum is not None:
        both = _change_of_tanh(difference, clean) * (torch.tanh(adv) + torch.tanh(clean))
        grad_sum = scale * (grad_sum * _slope(clean) - grad_a * both)
    return scale * grad_a * _slope(adv), grad_sum
