"""Plain PyTorch: any device, differentiable twice, float64 for float64 inputs. The oracle of every test."""

import torch


def unavailable(op: str, device: torch.device, dtype: torch.dtype, divergence: str | None) -> str | None:
    """Why this backend cannot serve ``op`` there: it always can, so None."""
    return None
