"""The gradients along which perturbations climb, seen from outside of a step."""

import pytest
from torch import Tensor

from alum_kernels.adversarial.perturbation import Perturbation


class Climbed:
    """What every perturbation climbed along, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gradients: list[Tensor] = []
        climb = Perturbation.climb

        def watched(perturbation: Perturbation, grads: list[Tensor]) -> None:
            self.gradients.extend(grad.clone() for grad in grads)
            climb(perturbation, grads)

        monkeypatch.setattr(Perturbation, "climb", watched)
