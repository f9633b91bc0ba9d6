"""Soft-capped logits, cap tanh(z / cap), on both sides of a linear divergence (Gemma 2, arXiv:2408.00118, section 2).

With z_b the clean product, z_d its difference from the adversarial one, t = tanh:

    b = cap t(z_b / cap)        a - b = cap t(z_d / cap) (1 - t_a t_b)                  no difference of two tanh
    dJ/dz_d = G_a (1 - t_a^2)   dJ/dz_b = S (1 - t_b^2) - G_a (t_a - t_b) (t_a + t_b)   S = dJ/da + dJ/db

Plain PyTorch on every backend: a few passes over a chunk, on whatever device it lies.
"""

import torch
from torch import Tensor


def finished_logits(products: Tensor, scale: float, cap: float | None) -> Tensor:
    """Logits of products to which the bias has been added: scaled, and capped unless ``cap`` is None."""
    scaled = products if scale == 1.0 else products * scale
    return scaled if cap is None else cap * torch.tanh(scaled / cap)


def soft_cap(difference: Tensor, clean: Tensor, cap: float, scale: float) -> tuple[Tensor, Tensor]:
    """(a - b, b) of capped logits from products ``difference`` and ``clean``, both times ``scale`` before the cap."""
    clean, difference = clean * (scale / cap), difference * (scale / cap)
    t_b, t_a = torch.tanh(clean), torch.tanh(clean + difference)
    return cap * torch.tanh(difference) * (1 - t_a * t_b), cap * t_b


def uncap_gradients(
    grad_a: Tensor, grad_sum: Tensor | None, difference: Tensor, clean: Tensor, cap: float, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Gradients to the products, from those to the capped logits that :func:`soft_cap` gave."""
    change, t_b = difference / cap, clean / cap
    t_a = t_b + change
    if grad_sum is not None:
        grad_sum = scale * (grad_sum * (1 - t_b * t_b) - grad_a * change * (t_a + t_b))
    return scale * grad_a * (1 - t_a * t_a), grad_sum
