"""Seeds of the noise, one a step, from a generator whose state a checkpoint carries."""

import torch
from torch import Tensor


class NoiseSeeds:
    """Draws seeds on the device of the model, so that nothing waits for the host.

    Args:
        seed: of the generator.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator: torch.Generator | None = None
        self._state: Tensor | None = None

    def draw(self, device: torch.device) -> Tensor:
        """The next seed, a one-element int64 tensor."""
        device = torch.empty(0, device=device).device  # "cuda" and "cuda:0" are one place
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device).manual_seed(self._seed)
            if self._state is not None:
                self._generator.set_state(self._state)
                self._state = None
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device, generator=self._generator)

    def get_state(self) -> Tensor | None:
        """State of the generator, None before the first seed of a training that began at its begin."""
        return self._state if self._generator is None else self._generator.get_state()

    def set_state(self, state: Tensor | None) -> None:
        """The next seed is the one that followed this state."""
        self._generator, self._state = None, state
