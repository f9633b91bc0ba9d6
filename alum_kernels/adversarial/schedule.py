"""How the weights and sizes of an adversarial step change over a training.

A schedule is a sequence of points (share of the training, value), joined by straight lines and constant outside of
them. Two points at one share are a jump, so that every curriculum is one: ``((0.5, 0.0), (0.5, 1.0))`` begins in the
middle, ``((0.0, 0.0), (0.1, 1.0))`` warms up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Points = tuple[tuple[float, float], ...]


def check_points(name: str, points: Sequence[Sequence[float]]) -> Points:
    """The points as tuples of floats.

    Raises:
        TypeError: something that is no pair of numbers.
        ValueError: shares outside of [0, 1] or in falling order, or negative or non-finite values.
    """
    if isinstance(points, str) or not isinstance(points, Sequence):
        raise TypeError(f"{name}: expected a sequence of (share of training, value), got {points!r}")
    checked = []
    for point in points:
        numbers = isinstance(point, Sequence) and not isinstance(point, str) and len(point) == 2
        if not numbers or any(isinstance(part, bool) or not isinstance(part, int | float) for part in point):
            raise TypeError(f"{name}: expected a sequence of (share of training, value), got {point!r} in it")
        share, value = (float(part) for part in point)
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: expected shares of the training from 0 to 1, got {share}")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: expected finite values >= 0, got {value}")
        if checked and share < checked[-1][0]:
            raise ValueError(f"{name}: expected rising shares of the training, got {share} after {checked[-1][0]}")
        checked.append((share, value))
    return tuple(checked)


def check_start(name: str, start: int | float) -> None:
    """Raises TypeError or ValueError unless ``start`` is an int >= 0 (a step) or a float from 0 to 1 (a share)."""
    if isinstance(start, bool) or not isinstance(start, int | float):
        raise TypeError(f"{name}: expected an int (a step) or a float (a share of the training), got {start!r}")
    if isinstance(start, int) and start < 0:
        raise ValueError(f"{name}: expected a step >= 0, got {start}")
    if isinstance(start, float) and not 0 <= start <= 1:
        raise ValueError(f"{name}: expected a share of the training from 0 to 1, got {start}")


@dataclass(frozen=True)
class Progress:
    """How far a training is: optimizer steps done, of ``total`` or of a number that nobody named."""

    step: int = 0
    total: int | None = None

    def share(self, name: str) -> float:
        """Steps done over steps in all; ``name`` is the setting that needs it.

        Raises:
            ValueError: the total is not known.
        """
        if self.total is None:
            raise ValueError(
                f"{name}: expected a training of known length; call AdversarialObjective.set_progress(step, total)"
            )
        return min(self.step / self.total, 1.0) if self.total > 0 else 1.0

    def started(self, start: int | float) -> bool:
        """Whether ``start``, a step or a share, is reached."""
        return self.step >= start if isinstance(start, int) else start == 0 or self.share("start") >= start

    def value(self, name: str, points: Points, default: float = 1.0) -> float:
        """The value of a schedule now, ``default`` where it has no points.

        Example:
            >>> Progress(5, 20).value("alpha_schedule", ((0.0, 0.0), (0.5, 1.0)))
            0.5
        """
        if len(points) < 2:
            return points[0][1] if points else default
        now = self.share(name)
        if now < points[0][0]:
            return points[0][1]
        for (left, low), (right, high) in pairwise(points):
            if left <= now < right:
                return low + (high - low) * (now - left) / (right - left)
        return points[-1][1]
