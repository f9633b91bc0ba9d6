"""Ways to fine-tune, by name: standard training, every preset of the library, and ALUM with a gradient that climbs."""

from alum_kernels import AdversarialConfig
from alum_kernels.adversarial.config import PRESETS

RADIUS = 1e-2
"""Of the ball of the normalised methods: a fifth of the standard deviation of MiniLM's word embeddings."""


def _normalised(normalize: str) -> AdversarialConfig:
    return AdversarialConfig.alum_finetuning(
        method=f"alum_{normalize}", normalize=normalize, std=RADIUS, epsilon=RADIUS, step_size=RADIUS
    )


FINE_TUNING: dict[str, AdversarialConfig | None] = {
    "standard": None,
    **{name: getattr(AdversarialConfig, name)() for name in PRESETS if name != "alum_pretraining"},
    "alum_linf": _normalised("linf"),
    "alum_sign": _normalised("sign"),
}
"""None is standard training."""


def chosen_methods(text: str) -> list[str]:
    """Names of a comma-separated list.

    Raises:
        ValueError: one is not in :data:`FINE_TUNING`, or there is none.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in FINE_TUNING]
    if unknown or not names:
        raise ValueError(f"expected names of {', '.join(FINE_TUNING)}, got {', '.join(unknown) or 'none'}")
    return names
