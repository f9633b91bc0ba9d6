"""What an adversarial step does: a frozen, validated set of numbers and words, with the published ones as presets."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from alum_kernels.adversarial.heads import POSITIONS
from alum_kernels.ops.checks import DISTRIBUTIONS, check_choice, check_magnitude
from alum_kernels.ops.dispatch import BACKENDS
from alum_kernels.ops.projected_ascent import LEVELS, NORMALIZE, NORMS
from alum_kernels.ops.symmetric_kl import DIVERGENCES, GRADIENTS

DROPOUT = ("shared", "independent", "off")

_CHOICES = {
    "distribution": DISTRIBUTIONS,
    "norm": NORMS,
    "normalize": NORMALIZE,
    "level": LEVELS,
    "divergence": DIVERGENCES,
    "ascent_divergence": DIVERGENCES,
    "gradient": GRADIENTS,
    "dropout": DROPOUT,
    "positions": POSITIONS,
}
_MAGNITUDES = ("alpha", "std", "step_size", "epsilon")
_COUNTS = ("steps", "signal_check_interval", "seed")


@dataclass(frozen=True)
class AdversarialConfig:
    """One adversarial regulariser: ``loss = task loss + alpha * divergence(adversarial, clean)``.

    Magnitudes are absolute, in units of the embeddings. The classmethods are the published settings.

    Attributes:
        method: name for logs and reports; it selects nothing.
        alpha: weight of the divergence.
        steps: ascent steps K; 0 compares with the noise alone.
        std, distribution: of the first perturbation (standard deviation, or half-width of the uniform one).
        step_size, epsilon: length of an ascent step and radius of the ball.
        norm, normalize, level: as in :func:`alum_kernels.projected_ascent`.
        divergence: what the model is trained on; ``"symmetric_kl"``, ``"kl"`` or ``"js"``. Regression heads always use
            the squared error.
        ascent_divergence: what the ascent climbs.
        gradient: convention of the training divergence, as in :func:`alum_kernels.symmetric_kl`.
        temperature: of both divergences.
        dropout: ``"shared"`` uses the same masks in every pass of a step, ``"independent"`` draws new ones,
            ``"off"`` runs every pass of the step without dropout.
        positions: of a language model, ``"labelled"`` compares the positions that predict a label, ``"all"`` those that
            the attention mask keeps.
        fused_head: True demands that a language model is trained without its logits, on its hidden states, and raises
            where it cannot be; False forms the logits; None forms them only where it must, and warns why.
        modules: names of the perturbed modules, as in ``model.named_modules()``; empty means the input embeddings
            (of an encoder-decoder: the encoder's).
        backend: of the ops; None picks the fastest that can serve.
        seed: of the noise; every rank uses the same.
        telemetry: collect the figures of :class:`alum_kernels.adversarial.telemetry.Telemetry`.
        signal_check_interval: every so many steps one more forward measures J(delta) / J(delta / 2), near 4 where the
            divergence is signal and near 1 where it is rounding noise; 0 never does.
    """

    method: str = "alum"
    alpha: float = 1.0
    steps: int = 1
    std: float = 1e-5
    distribution: str = "normal"
    step_size: float = 1e-3
    epsilon: float = 1e-5
    norm: str = "linf"
    normalize: str = "none"
    level: str = "token"
    divergence: str = "symmetric_kl"
    ascent_divergence: str = "symmetric_kl"
    gradient: str = "full"
    temperature: float = 1.0
    dropout: str = "shared"
    positions: str = "labelled"
    fused_head: bool | None = None
    modules: tuple[str, ...] = ()
    backend: str | None = None
    seed: int = 0
    telemetry: bool = True
    signal_check_interval: int = 0

    def __post_init__(self) -> None:
        for name, valid in _CHOICES.items():
            check_choice(name, getattr(self, name), valid)
        if self.backend is not None:
            check_choice("backend", self.backend, BACKENDS)
        for name in (*_MAGNITUDES, "temperature"):
            check_magnitude(name, getattr(self, name))
        if self.temperature == 0:
            raise ValueError("temperature: expected a number > 0, got 0")
        for name in _COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < 0:
                raise ValueError(f"{name}: expected a number >= 0, got {value}")
        if self.fused_head is not None and not isinstance(self.fused_head, bool):
            raise TypeError(f"fused_head: expected True, False or None, got {self.fused_head!r}")
        if isinstance(self.modules, str):
            raise TypeError("modules: expected a sequence of module names, got one string")
        object.__setattr__(self, "modules", tuple(self.modules))

    def replace(self, **changes: Any) -> "AdversarialConfig":
        """A copy with some fields changed, validated again."""
        _check_fields(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists; :meth:`from_dict` reads them back."""
        return {**dataclasses.asdict(self), "modules": list(self.modules)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "AdversarialConfig":
        """Raises ValueError for a field that does not exist, naming those that do."""
        _check_fields(fields)
        return cls(**fields)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "AdversarialConfig":
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError(f"AdversarialConfig: expected a JSON object, got {type(fields).__name__}")
        return cls.from_dict(fields)

    @classmethod
    def alum_pretraining(cls, **changes: Any) -> "AdversarialConfig":
        """ALUM for (continual) pre-training: alpha 10, sigma = epsilon = 1e-5, eta = 1e-3, K = 1, raw gradient, clip.

        With these published constants the ascent barely moves delta: the gradient of the divergence at 1e-5 is so small
        that eta times it is about 1e-6 of delta's own length on a pretrained six-layer model, and the clip halves the
        divergence. The telemetry's ascent gain shows it. ``normalize="linf"`` or ``"sign"`` climbs.

        Source: Liu et al., arXiv:2004.08994, Algorithm 1 and section 4.1.
        """
        return cls(method="alum_pretraining", alpha=10.0).replace(**changes)

    @classmethod
    def alum_finetuning(cls, **changes: Any) -> "AdversarialConfig":
        """ALUM for fine-tuning: as :meth:`alum_pretraining` with alpha 1, and as barely moving.

        Source: Liu et al., arXiv:2004.08994, Algorithm 1 and section 4.1.
        """
        return cls(method="alum_finetuning", alpha=1.0).replace(**changes)

    @classmethod
    def smart(cls, **changes: Any) -> "AdversarialConfig":
        """SMART's smoothness-inducing regulariser: g / max|g| per sequence, epsilon = sigma = 1e-5, eta = 1e-3.

        The Bregman proximal half of SMART is not part of this preset.

        Source: Jiang et al., arXiv:1911.03437, equation 3, Algorithm 1 and section 4.1 (lambda 1).
        """
        return cls(method="smart", normalize="linf", level="sequence").replace(**changes)

    @classmethod
    def mtdnn(cls, **changes: Any) -> "AdversarialConfig":
        """What the official ALUM and SMART code computes, for people who reproduce it.

        The raw gradient step is followed by a rescaling of every token's delta to an infinity norm near 1 (not by a
        clip to 1e-5), the ascent climbs the one-sided KL, training detaches the targets and dropout is independent in
        every pass.

        Source: the SmartPerturbation class of https://github.com/namisan/mt-dnn (mt_dnn/perturbation.py).
        """
        return cls(
            method="mtdnn",
            norm="linf_rescale",
            ascent_divergence="kl",
            gradient="detach_targets",
            dropout="independent",
        ).replace(**changes)

    @classmethod
    def r3f(cls, **changes: Any) -> "AdversarialConfig":
        """R3F: noise only, no ascent; the control in every comparison of adversaries.

        Source: Aghajanyan et al., arXiv:2008.03156, equation 3 (normal noise, sigma 1e-5, lambda 1).
        """
        return cls(method="r3f", steps=0, step_size=0.0, norm="none").replace(**changes)


PRESETS = ("alum_pretraining", "alum_finetuning", "smart", "mtdnn", "r3f")
"""Names of the classmethods of :class:`AdversarialConfig`."""


def _check_fields(fields: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(AdversarialConfig)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"AdversarialConfig: unknown fields {', '.join(unknown)}; known are {', '.join(known)}")
