"""What is searched, and how: the radius of a ball, and the options that every robustness figure has."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from alum_kernels.ops.checks import check_choice, check_count, check_magnitude
from alum_kernels.ops.projected_ascent import LEVELS

ATTACK_NORMS = ("linf", "l2")
INDEPENDENT_LEVELS = ("token", "sequence")
"""Groups of the l2 ball in which one sample's perturbation leaves the others' alone."""

Radius = float | Tensor | Callable[[Mapping[str, Any]], Tensor]
"""One radius, or (N,) one for each sample of all batches in order, or a function of a batch that returns (B,)."""


@dataclass(frozen=True)
class Search:
    """How balls around a model's embeddings are searched: the keywords that the public functions share.

    Attributes:
        steps: gradient steps K of an ascent.
        step_size: length of a step; None goes by the radius.
        norm: one of ``ATTACK_NORMS``.
        level: the group of the l2 ball.
        restarts: ascents from different random starts.
        seed: of the random starts.
        modules: names of the perturbed modules; empty means the input embeddings.
        head: name of the head; None recognises it from the model's class.
        backend: of the ops; None picks the fastest that can serve.

    Raises:
        ValueError, TypeError: an option out of range; the message names it.
    """

    steps: int = 20
    step_size: float | None = None
    norm: str = "l2"
    level: str = "sequence"
    restarts: int = 1
    seed: int = 0
    modules: Sequence[str] = ()
    head: str | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 0)
        check_count("restarts", self.restarts, 1)
        check_choice("norm", self.norm, ATTACK_NORMS)
        check_choice("level", self.level, LEVELS)
        if self.step_size is not None:
            check_magnitude("step_size", self.step_size)
        if isinstance(self.modules, str):
            raise TypeError("modules: expected a sequence of module names, got one string")


def check_radius(epsilon: Radius, norm: str, level: str) -> None:
    """A radius in any of its forms."""
    if isinstance(epsilon, Tensor):
        if epsilon.dim() != 1 or not epsilon.is_floating_point():
            raise ValueError(
                f"epsilon: expected floating-point numbers of shape (samples,), "
                f"got {epsilon.dtype} of shape {tuple(epsilon.shape)}"
            )
        if not bool(((epsilon >= 0) & epsilon.isfinite()).all()):
            raise ValueError("epsilon: expected finite numbers >= 0")
    elif not callable(epsilon):
        check_magnitude("epsilon", epsilon, "a number, a tensor or a function of a batch")
    if norm == "l2" and level == "batch" and (isinstance(epsilon, Tensor) or callable(epsilon)):
        raise ValueError("epsilon: norm='l2' at level='batch' has one radius for the batch, so expected a number")
