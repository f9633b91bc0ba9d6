"""A step of the rescaled ascent, with an epsilon of one's own: the one that MT-DNN and smart-pytorch share."""

from torch import Tensor

from alum_kernels.backends.reference.projected_ascent import RESCALE_FLOOR
from alum_kernels.ops.projected_ascent import projected_ascent


def rescaled_ascent(
    embeds: Tensor,
    grad: Tensor,
    delta: Tensor,
    *,
    step_size: float,
    epsilon: float,
    level: str = "token",
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """embeds + delta', and delta' = x / (max|x| + epsilon) with x = delta + step_size grad, in one fused op.

    The op adds a constant of its own to the norm. That is the same of c x with c = constant / epsilon.

    Args:
        embeds, grad: (B, S, H).
        delta: (B, S, H) fp32 (fp64 for fp64).
        step_size: factor on the gradient.
        epsilon: added to the norm; > 0.
        level: of the norm, ``"token"`` or ``"sequence"``.
        mask: (B, S); tokens of 0 stay as they are, and count in no norm.
    """
    share = RESCALE_FLOOR / epsilon
    return projected_ascent(
        embeds,
        grad,
        delta * share,
        step_size=step_size * share,
        epsilon=0.0,
        norm="linf_rescale",
        level=level,
        mask=mask,
        return_delta=True,
    )
