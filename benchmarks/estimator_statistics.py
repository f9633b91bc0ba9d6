"""EstimatorStatistics and variance of a gradient estimator, from a stream of gradients that are never held together.

Of batch i, three draws of noise and dropout give the exact gradient thrice: a_i, b_i and c_i. The estimator's e_i is
taken with the draw of c_i. With d_i = e_i - c_i, A = mean a_i and C = mean c_i:

    bias           mean <d_i, A> / <C, A>
    bias squared   (|sum d_i|^2 - sum |d_i|^2) / (n (n - 1)) / <C, A>
    variance       (mean |e_i - b_i|^2 - mean |c_i - b_i|^2) / mean |c_i|^2
    cosine         of e_i and c_i, the median

Why the bias of an unbiased estimator has expectation zero, although A and the d_i come from the same batches: the
batches held fixed, E d_i = E e_i - E c_i = 0 over the draws b and c and the estimator's own choices, and A is made of
other draws, so E <d_i, A> = <E d_i, E A> = 0. Were A the mean of the c_i, it would contain c_i / n, and <d_i, A> would
have the expectation -Var(c_i) / n. That e_i and c_i share a draw makes d_i small where the estimator leaves noise and
masks as they are, and has no part in the argument. <C, A> is |E gradient|^2 without the noise of A, likewise.

The variance is what the estimator adds to another draw of the exact gradient: |e_i - b_i|^2 has the noise of both, and
|c_i - b_i|^2 that of two exact ones. The bias squared leaves out |d_i|^2, the noise of the sum, and so may be negative.
"""

import math
import statistics
from dataclasses import dataclass, field

import torch
from scipy import stats
from torch import Tensor

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Exact:
    """The exact gradients of one batch, of two draws, and the direction that biases are measured along.

    Attributes:
        same_draw: c_i, (P,), of the draw that the estimators have.
        other_draw: b_i, (P,).
        direction: A, (P,).
    """

    same_draw: Tensor
    other_draw: Tensor
    direction: Tensor


@dataclass(frozen=True)
class EstimatorStatistics:
    """Relative bias along the mean exact gradient, with its interval, and what the statistics besides it are.

    Attributes:
        bias, low, high: relative; the interval is Student's, over the units.
        squared: squared length of the bias over that of the mean exact gradient.
        variance: added by the estimator, relative to the mean square of an exact gradient.
        cosine: median over the units.
        units: how many differences were averaged: batches, or periods of batches.
    """

    bias: float
    low: float
    high: float
    squared: float
    variance: float
    cosine: float
    units: int

    @property
    def unbiased(self) -> bool:
        """Whether the interval holds zero; of twenty unbiased estimators, one is expected to be called biased."""
        return self.low <= 0 <= self.high


@dataclass
class GradientMoments:
    """Running sums over the batches for one estimator.

    Args:
        period: an estimator that has its gradient in one of so many consecutive steps is averaged over them first; a
            period that is not complete does not count. The variance is that of single steps nevertheless.
    """

    period: int = 1
    _along: list[float] = field(default_factory=list, init=False)
    _exact_along: list[float] = field(default_factory=list, init=False)
    _squares: list[float] = field(default_factory=list, init=False)
    _cosines: list[float] = field(default_factory=list, init=False)
    _added: list[float] = field(default_factory=list, init=False)
    _exact_squares: list[float] = field(default_factory=list, init=False)
    _sum: Tensor | None = field(default=None, init=False)
    _pending: tuple[Tensor, Tensor] | None = field(default=None, init=False)
    _steps: int = field(default=0, init=False)

    def add(self, estimate: Tensor, exact: Exact) -> None:
        """Take e_i, (P,), which is left as it is."""
        same, other = exact.same_draw, exact.other_draw
        exact_square = _dot(same, same)
        self._added.append(
            _dot(estimate, estimate) - 2 * _dot(estimate, other) - (exact_square - 2 * _dot(same, other))
        )
        self._exact_squares.append(exact_square)
        if self.period == 1:
            self._add_unit(estimate, same, exact.direction)
            return
        if self._steps % self.period == 0:
            self._pending = torch.zeros_like(same), torch.zeros_like(same)
        for mean, gradient in zip(self._pending, (estimate, same), strict=True):
            mean.add_(gradient, alpha=1 / self.period)
        self._steps += 1
        if self._steps % self.period == 0:
            self._add_unit(*self._pending, exact.direction)
            self._pending = None

    def _add_unit(self, estimate: Tensor, exact: Tensor, direction: Tensor) -> None:
        lengths = math.sqrt(_dot(estimate, estimate) * _dot(exact, exact))
        self._cosines.append(_dot(estimate, exact) / lengths if lengths > 0 else 0.0)
        self._exact_along.append(_dot(exact, direction))
        difference = estimate - exact
        self._along.append(_dot(difference, direction))
        self._squares.append(_dot(difference, difference))
        if self._sum is None:
            self._sum = difference
        else:
            self._sum.add_(difference)

    def result(self) -> EstimatorStatistics:
        """Of all that was added.

        Raises:
            ValueError: fewer than two units were.
        """
        units = len(self._along)
        if units < 2:
            raise ValueError(f"batches: expected two periods of {self.period} at the least, got {units}")
        along, exact_along = torch.tensor(self._along).double(), torch.tensor(self._exact_along).double()
        scale = exact_along.mean()
        bias = along.mean() / scale
        # of a ratio of means, to first order
        error = (along - bias * exact_along).std() / math.sqrt(units) / scale.abs()
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, units - 1) * error)
        squared = (_dot(self._sum, self._sum) - sum(self._squares)) / (units * (units - 1)) / float(scale)
        return EstimatorStatistics(
            bias=float(bias),
            low=float(bias) - half,
            high=float(bias) + half,
            squared=squared,
            variance=sum(self._added) / sum(self._exact_squares),
            cosine=statistics.median(self._cosines),
            units=units,
        )


def _dot(left: Tensor, right: Tensor) -> float:
    return float(torch.dot(left, right))


class FlatGradient:
    """The gradients of a model's parameters as one vector, into which every backward adds.

    Args:
        model: its ``.grad`` are parts of the vector from here on.

    Attributes:
        values: (P,) in the parameters' dtype.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.values = torch.zeros(
            sum(map(torch.Tensor.numel, parameters)), dtype=parameters[0].dtype, device=parameters[0].device
        )
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, self.values.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
