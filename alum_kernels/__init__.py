"""Fused kernels and a thin training wrapper for adversarial training of transformer language models."""

from alum_kernels.adversarial.config import AdversarialConfig
from alum_kernels.adversarial.finite import FiniteGuard, NonFiniteError
from alum_kernels.adversarial.noise_place import NoisePlace
from alum_kernels.adversarial.objectives import AdversarialObjective
from alum_kernels.adversarial.output import AdversarialOutput
from alum_kernels.ops.dispatch import BackendUnavailableError
from alum_kernels.ops.linear_ascent import linear_products, linear_symmetric_kl_grad
from alum_kernels.ops.linear_symmetric_kl import linear_kl, linear_symmetric_kl
from alum_kernels.ops.noise_init import noise_init
from alum_kernels.ops.projected_ascent import projected_ascent
from alum_kernels.ops.squared_error import squared_error
from alum_kernels.ops.symmetric_kl import js, kl, squared_hellinger, symmetric_kl, symmetric_kl_grad

__version__ = "0.1.0"

__all__ = [
    "AdversarialConfig",
    "AdversarialObjective",
    "AdversarialOutput",
    "BackendUnavailableError",
    "FiniteGuard",
    "NoisePlace",
    "NonFiniteError",
    "js",
    "kl",
    "linear_kl",
    "linear_products",
    "linear_symmetric_kl",
    "linear_symmetric_kl_grad",
    "noise_init",
    "projected_ascent",
    "squared_error",
    "squared_hellinger",
    "symmetric_kl",
    "symmetric_kl_grad",
]
