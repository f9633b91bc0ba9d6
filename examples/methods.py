"""Ways to fine-tune, by name: standard training, every preset of the library, and settings that suit MiniLM."""

from alum_kernels import AdversarialConfig
from alum_kernels.adversarial.config import PRESETS
from alum_kernels.adversarial.presets import FREELB_GLUE
from alum_kernels.training.methods import BY_TASK, STANDARD

PRE_TRAINING = ("alum_pretraining", "alum_continual")

DEVIATION = 0.0556
"""Standard deviation of MiniLM's word embeddings, for constants that were published for embeddings of deviation 1."""

RADIUS = 1e-2
"""Of the ball of the normalised methods: a fifth of the standard deviation of MiniLM's word embeddings."""

SHARE = RADIUS / DEVIATION
"""The same ball, relative to what is perturbed."""

ALUM_LINF = AdversarialConfig.alum_finetuning(
    method="alum_linf", normalize="linf", std=RADIUS, epsilon=RADIUS, step_size=RADIUS
)
SAVINGS = {
    "part": {"adversarial_fraction": 0.25},
    "interval": {"adversarial_interval": 4},
    # hidden states are larger than embeddings: the same share of their size
    "depth": {"ascent_depth": 3, "units": "rms", **dict.fromkeys(("std", "epsilon", "step_size"), SHARE)},
    "bf16": {"ascent_dtype": "bfloat16"},
    "kept": {"delta_lifetime": 2},
}

OWN_SETTINGS = {
    ALUM_LINF.method: ALUM_LINF,
    **{
        method: ALUM_LINF.replace(method=method, **saving)
        for method, saving in ((f"{ALUM_LINF.method}_{name}", saving) for name, saving in SAVINGS.items())
    },
    "alum_sign": AdversarialConfig.alum_finetuning(
        method="alum_sign", normalize="sign", std=RADIUS, epsilon=RADIUS, step_size=RADIUS
    ),
    "smart_proximal": AdversarialConfig.smart(
        method="smart_proximal", proximal=1.0, proximal_momentum=((0.1, 0.99), (0.1, 0.999))
    ),
    "fgm": AdversarialConfig.fgm(step_size=5 * DEVIATION, epsilon=5 * DEVIATION),
    "vat": AdversarialConfig.vat(std=0.1 * DEVIATION, step_size=5 * DEVIATION, epsilon=5 * DEVIATION),
}
"""ALUM with a gradient that moves the perturbation; the same at less cost (a quarter of each batch, every fourth step,
above the third layer, an ascent in bf16, perturbations kept for a second visit); SMART with both of its halves; and
presets in MiniLM's units.
"""

METHODS = tuple(dict.fromkeys((STANDARD, *(name for name in PRESETS if name not in PRE_TRAINING), *OWN_SETTINGS)))


def method_config(method: str, glue_task: str | None = None) -> AdversarialConfig | None:
    """The setting of a method; None is standard training.

    Args:
        method: one of :data:`METHODS`.
        glue_task: a task as ``FREELB_GLUE`` calls it, whose constants FreeLB and its relatives take; None or an unknown
            one takes their default.
    """
    if method == STANDARD:
        return None
    if method in OWN_SETTINGS:
        return OWN_SETTINGS[method]
    preset = getattr(AdversarialConfig, method)
    if method in BY_TASK and glue_task in FREELB_GLUE:
        return preset(glue_task)
    return preset()


def chosen_methods(text: str) -> list[str]:
    """Names of a comma-separated list.

    Raises:
        ValueError: one is not in :data:`METHODS`, or there is none.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise ValueError(f"expected names of {', '.join(METHODS)}, got {', '.join(unknown) or 'none'}")
    return names
