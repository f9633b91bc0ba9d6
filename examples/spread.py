"""Several seeds in three numbers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """Median and quartiles, by linear interpolation between the values."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Raises ValueError where there are no values.

        Example:
            >>> Spread.of([3.0, 1.0, 2.0])
            Spread(median=2.0, lower=1.5, upper=2.5)
        """
        if not values:
            raise ValueError("values: expected at least one, got none")
        places = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
        return cls(*torch.tensor(values, dtype=torch.float64).quantile(places).tolist())

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def __format__(self, form: str) -> str:
        return f"{self.median:{form}} [{self.lower:{form}}, {self.upper:{form}}]"
