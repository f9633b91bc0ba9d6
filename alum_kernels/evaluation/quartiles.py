"""Several numbers in three."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Quartiles(NamedTuple):
    """The quartiles of some numbers; where they fall between two of them, interpolated.

    Attributes:
        lower, median, upper: a quarter, half and three quarters of the numbers lie below.
    """

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Tensor | Sequence[float]) -> "Quartiles":
        """Those of a 1-d tensor or a sequence, ``values``.

        Raises:
            ValueError: there are no values.

        Example:
            >>> Quartiles.of([3.0, 1.0, 2.0])
            Quartiles(lower=1.5, median=2.0, upper=2.5)
        """
        values = torch.as_tensor(values, dtype=torch.float64)
        if values.numel() == 0:
            raise ValueError("values: expected at least one, got none")
        return cls(*values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)).tolist())

    def to_dict(self) -> dict[str, float]:
        """By name, as JSON has it."""
        return self._asdict()

    def __format__(self, form: str) -> str:
        return f"{self.median:{form}} [{self.lower:{form}}, {self.upper:{form}}]"
