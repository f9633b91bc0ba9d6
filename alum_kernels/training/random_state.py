"""The generators that dropout draws from: torch's of the CPU and of every CUDA device."""

from typing import Any

import torch


def random_state() -> dict[str, Any]:
    """Their states, for a checkpoint."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_random_state(state: dict[str, Any]) -> None:
    """Draw on from these states; those of devices that are not here are left."""
    torch.set_rng_state(state["cpu"])
    for device, one in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(one, device)
