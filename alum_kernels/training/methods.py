"""A method by name, with constants of one's own, and its objective on a model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from alum_kernels.adversarial.config import PRESETS, AdversarialConfig
from alum_kernels.adversarial.objectives import AdversarialObjective
from alum_kernels.adversarial.presets import FREELB_GLUE
from alum_kernels.ops.dispatch import BackendUnavailableError, choose
from alum_kernels.training.errors import MethodError

STANDARD = "standard"
METHODS = (STANDARD, *PRESETS)

BY_TASK = ("freelb", "pgd", "freeat", "yopo")
"""Presets whose constants depend on the task: ``freelb:sst-2``."""

_RENAMED = {"steps": "ascent_steps"}
CONSTANTS = {
    _RENAMED.get(field.name, field.name): field.name
    for field in dataclasses.fields(AdversarialConfig)
    if field.name not in ("method", "seed")
}
"""Name of a setting -> field of :class:`AdversarialConfig`; ``steps`` and ``seed`` are the training's own."""


def method_config(name: str, constants: Mapping[str, Any], seed: int) -> AdversarialConfig | None:
    """The setting of a method; None is standard training.

    Args:
        name: one of :data:`METHODS`; of :data:`BY_TASK` also with a colon and a GLUE task, ``freelb:sst-2``.
        constants: changes of the preset, by :data:`CONSTANTS`.
        seed: of the noise.

    Raises:
        MethodError: an unknown method or task, constants that no step could do, or any with standard training.
    """
    preset, _, task = name.partition(":")
    if preset not in METHODS:
        raise MethodError(f"method: expected one of {', '.join(METHODS)}, got {preset!r}")
    if task and (preset not in BY_TASK or task not in FREELB_GLUE):
        raise MethodError(
            f"method: expected one of {', '.join(BY_TASK)} before a colon and of {', '.join(FREELB_GLUE)} behind it, "
            f"got {name!r}"
        )
    if preset == STANDARD:
        if constants:
            raise MethodError(f"{', '.join(constants)}: expected a method that perturbs, got {STANDARD}")
        return None
    changes = {CONSTANTS[constant]: value for constant, value in constants.items()}
    try:
        return getattr(AdversarialConfig, preset)(*([task] if task else []), **changes, seed=seed)
    except (ValueError, TypeError) as error:
        raise MethodError(f"method {name}: {error}") from error


def adversarial_objective(model: nn.Module, config: AdversarialConfig | None) -> AdversarialObjective | None:
    """The objective of a method, None for standard training.

    Raises:
        MethodError: the method has no meaning for this model, or its backend does not serve the model's device.
    """
    if config is None:
        return None
    try:
        choose("noise_init", config.backend, next(model.parameters()))
    except BackendUnavailableError as error:
        raise MethodError(str(error)) from error
    try:
        return AdversarialObjective(model, config)
    except ValueError as error:
        raise MethodError(f"method {config.method}: not for {type(model).__name__}: {error}") from error


def check_resumable(config: AdversarialConfig | None, accumulation: int) -> None:
    """Refuse what this loop cannot stop and go on with, or cannot accumulate.

    Raises:
        MethodError: with the reason.
    """
    if config is None:
        return
    if config.delta_lifetime > 1:
        raise MethodError(
            f"delta_lifetime: expected 1, got {config.delta_lifetime}: kept perturbations are in no checkpoint, "
            "and a resumed run would differ"
        )
    if config.backward == "replay" and accumulation > 1:
        raise MethodError(
            f"accumulation: expected 1 for {config.method}, which updates the model at each replay of a batch, "
            f"got {accumulation}"
        )
