"""What an adversarial step does: a frozen, validated set of numbers and words. Published ones are in ``presets``."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alum_kernels.adversarial.config_checks import check_combination
from alum_kernels.adversarial.heads import POSITIONS
from alum_kernels.adversarial.presets import PRESETS, Presets
from alum_kernels.adversarial.schedule import Points, check_points, check_start
from alum_kernels.ops.checks import DISTRIBUTIONS, check_choice, check_count, check_magnitude
from alum_kernels.ops.dispatch import BACKENDS
from alum_kernels.ops.projected_ascent import LEVELS, NORMALIZE, NORMS
from alum_kernels.ops.symmetric_kl import DIVERGENCES, GRADIENTS

__all__ = ["PRESETS", "AdversarialConfig"]

ASCENTS = ("divergence", "task", "linearity")
UPDATES = ("add", "replace")
BACKWARDS = ("final", "accumulate", "replay")
NOISE_LEVELS = ("element", "group")
UNITS = ("absolute", "rms", "std")
SITES = ("embeddings", "embedding_norm", "embedding_norm_input")
SIDES = ("encoder", "decoder", "both")
DROPOUT = ("shared", "independent", "off")
ASCENT_DTYPES = ("float32", "bfloat16", "float16", "float8")
MEMORY = ("high", "low")

_CHOICES = {
    "ascent": ASCENTS,
    "update": UPDATES,
    "backward": BACKWARDS,
    "noise_level": NOISE_LEVELS,
    "units": UNITS,
    "site": SITES,
    "side": SIDES,
    "distribution": DISTRIBUTIONS,
    "norm": NORMS,
    "normalize": NORMALIZE,
    "level": (*LEVELS, "sample"),
    "divergence": DIVERGENCES,
    "ascent_divergence": DIVERGENCES,
    "gradient": GRADIENTS,
    "dropout": DROPOUT,
    "memory": MEMORY,
    "positions": POSITIONS,
}
_MAGNITUDES = (
    "alpha",
    "clean_weight",
    "adversarial_weight",
    "linearity",
    "linearity_gradient",
    "std",
    "step_size",
    "epsilon",
    "proximal",
)
_COUNTS = ("steps", "inner_steps", "ascent_depth", "signal_check_interval", "seed")
_PERIODS = ("proximal_interval", "adversarial_interval", "delta_lifetime")


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig(Presets):
    """What a training step adds to the task's loss L, around the clean embeddings e:

        loss = clean_weight L(e) + adversarial_weight L(e + delta) + alpha D(f(e + delta), f(e))
               + linearity gamma + linearity_gradient |delta . dL/de| + proximal D(f(e), teacher's f(e))

    with delta = Pi(delta + step_size normalise(gradient)), ``steps`` times from noise. (``backward`` has other sums.)
    The classmethods are the published settings.

    The loss:
        clean_weight, adversarial_weight: weights of the task's loss at e and at e + delta.
        alpha: weight of the divergence D.
        linearity, linearity_gradient: with ``ascent="linearity"``, weights of gamma = |l(e + delta) - l(e) - delta .
            dl/de| and of |delta . dl/de|, l being the loss of a sample.
        proximal: weight mu of the Bregman proximal term, the divergence of the clean prediction from that of a teacher.
        proximal_momentum: beta of the teacher, beta teacher + (1 - beta) model; 0 makes it the model as it was. A
            number, or ``(share of training, beta)`` points.
        proximal_interval: optimizer steps S between two updates of the teacher.

    The comparison:
        divergence: what the model is trained on; ``"symmetric_kl"``, ``"kl"``, ``"js"`` or ``"squared_hellinger"``.
            Regression heads always use the squared error.
        gradient: convention of the training divergence, as in :func:`alum_kernels.symmetric_kl`.
        temperature: of both divergences.
        positions: of a language model or token labels, ``"labelled"`` compares the positions that have a label,
            ``"all"`` those that the attention mask keeps (of packed documents, not their last).

    The ascent:
        ascent: what it climbs: ``"divergence"`` from the clean prediction, ``"task"``, the task's loss, or
            ``"linearity"``, gamma.
        ascent_divergence: the divergence that is climbed.
        steps: ascent steps K; 0 takes the noise alone.
        update: ``"add"`` steps go on from the last perturbation; ``"replace"`` keeps their direction only (power
            iteration): all but the last have the length of the first noise, the last has ``step_size``.
        inner_steps, first_layer: with ``backward="accumulate"``: each ascent is so many steps through the model up to
            the output of this module (None: the first transformer layer), along one gradient of the loss to that
            output. 0 goes through the whole model.

    The size of the perturbation:
        std, distribution: of the first one (standard deviation, or half-width of the uniform one).
        noise_level: ``"element"``: ``std`` is of an element; ``"group"``: of n elements together, each has std/sqrt(n).
        step_size, normalize: length of an ascent step, and what the gradient is divided by.
        epsilon, norm: radius of the ball, and its norm, as in :func:`alum_kernels.projected_ascent`.
        level: the group of these norms: ``"token"``, ``"sequence"``, ``"batch"``, or ``"sample"``, which takes the
            choices of a multiple-choice sample as one group, and is a sequence elsewhere.
        units: of ``std``, ``step_size`` and ``epsilon``: ``"absolute"`` in those of the embeddings; ``"rms"`` relative
            to the root mean square of a group's elements, and for l2 lengths and a group's noise to the group's norm;
            ``"std"`` the same about the mean of each token, which is what a layer norm divides by.

    Its place:
        site: the ``"embeddings"``, the output of the ``"embedding_norm"``, or its input (``"embedding_norm_input"``).
        side: of an encoder-decoder, ``"encoder"``, ``"decoder"`` or ``"both"``.
        modules: names of the modules to perturb, as in ``model.named_modules()``, instead of ``site`` and ``side``.
        excluded_tokens: token ids whose positions are never perturbed, such as ``tokenizer.all_special_ids``.
        detach_embeddings: the perturbed passes do not train what lies before the perturbed module's output.

    The passes:
        backward: which of them train the model: ``"final"`` the one at the last perturbation; ``"accumulate"`` each of
            the K + 1 passes of the ascent, with 1/(K + 1) of its weight; ``"replay"`` each of them, with an update of
            the parameters after each. The latter two train on the task's loss at e + delta alone.
        dropout: ``"shared"`` uses the same masks in every pass of a step, ``"independent"`` draws new ones, ``"off"``
            runs every pass of the step in evaluation mode (in which Hugging Face layers are not checkpointed).
        fused_head: True demands that a language model is trained without its logits, on its hidden states, and raises
            where it cannot be; False forms the logits; None forms them only where it must, and warns why.
        backend: of the ops; None picks the fastest that can serve.

    What they cost:
        ascent_dtype: precision of the ascent's passes where it is not that of the training: ``"bfloat16"``,
            ``"float16"`` or ``"float32"`` as of ``torch.autocast``, or ``"float8"``, whose linear layers torchao
            computes (Hopper and later). Where the signal is checked, ``ascent_cosine`` is the cosine of its first
            gradient with that of the training's precision. CUDA draws other dropout masks in another dtype.
        ascent_depth: number of layers below the perturbation: 0 perturbs the embeddings, k the hidden state after k
            layers, which perturbed passes then skip. Another regulariser: the lower layers and the embeddings are
            trained by it, but not probed.
        adversarial_fraction: share of each batch's samples, chosen at random, that the divergence is computed on. Its
            sum is divided by that share of all rows, so that the expected gradient is that of the whole batch. Of p / q
            with q <= 64, p of each q consecutive samples where batches begin and end at multiples of q.
        adversarial_interval: the adversarial terms are there in every so-manieth optimizer step only, with so many
            times their weight: the mean over the steps is the same, where the model stands still.
        delta_lifetime: so many visits of a sample its perturbation serves: climbed at the first, taken as it is at the
            others, which have no ascent. Needs ``samples=`` of :meth:`AdversarialObjective.forward`.
        labelled_capacity: share of a batch's positions that may have a label, of a language model trained without its
            logits. None reads their number from the device, of every part of a batch; with one nothing waits, and a
            batch with more labels has a loss of NaN.
        memory: ``"low"`` holds the graph of one pass at a time, and runs the clean pass twice; needs
            :meth:`AdversarialObjective.backward`.

    In the course of the training:
        start: the adversary begins here, the standard objective comes before: an optimizer step (int), or a share of
            the training (float).
        alpha_schedule, epsilon_schedule: ``(share of training, factor)`` points, joined by straight lines; two points
            at one share are a jump. Factors of ``alpha``, ``linearity`` and ``linearity_gradient``, and of ``epsilon``,
            ``std`` and ``step_size`` together.

    Besides:
        method: name for logs and reports; it selects nothing.
        seed: of the noise; every rank uses the same.
        telemetry: collect the figures of :class:`alum_kernels.adversarial.telemetry.Telemetry`.
        signal_check_interval: every so many perturbed steps one more forward measures J(delta) / J(delta / 2), near 4
            where the divergence is signal and near 1 where it is rounding noise (and, with ``ascent_dtype``, one more
            ascent the cosine); 0 never does.

    Raises:
        TypeError, ValueError: a field of the wrong type, an unknown word, a number out of range, or a combination that
            no step could do; the message names the field.
    """

    clean_weight: float = 1.0
    adversarial_weight: float = 0.0
    alpha: float = 1.0
    linearity: float = 0.0
    linearity_gradient: float = 0.0
    proximal: float = 0.0
    proximal_momentum: float | Points = 0.0
    proximal_interval: int = 1

    divergence: str = "symmetric_kl"
    gradient: str = "full"
    temperature: float = 1.0
    positions: str = "labelled"

    ascent: str = "divergence"
    ascent_divergence: str = "symmetric_kl"
    steps: int = 1
    update: str = "add"
    inner_steps: int = 0
    first_layer: str | None = None

    std: float = 1e-5
    distribution: str = "normal"
    noise_level: str = "element"
    step_size: float = 1e-3
    normalize: str = "none"
    epsilon: float = 1e-5
    norm: str = "linf"
    level: str = "token"
    units: str = "absolute"

    site: str = "embeddings"
    side: str = "encoder"
    modules: tuple[str, ...] = ()
    excluded_tokens: tuple[int, ...] = ()
    detach_embeddings: bool = False

    backward: str = "final"
    dropout: str = "shared"
    fused_head: bool | None = None
    backend: str | None = None

    ascent_dtype: str | None = None
    ascent_depth: int = 0
    adversarial_fraction: float = 1.0
    adversarial_interval: int = 1
    delta_lifetime: int = 1
    labelled_capacity: float | None = None
    memory: str = "high"

    start: int | float = 0
    alpha_schedule: Points = ()
    epsilon_schedule: Points = ()

    method: str = "alum"
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
            check_count(name, getattr(self, name))
        if self.fused_head is not None and not isinstance(self.fused_head, bool):
            raise TypeError(f"fused_head: expected True, False or None, got {self.fused_head!r}")
        for name in ("detach_embeddings", "telemetry"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        self._check_members("modules", str, "module names")
        self._check_members("excluded_tokens", int, "token ids")
        for name in ("alpha_schedule", "epsilon_schedule"):
            object.__setattr__(self, name, check_points(name, getattr(self, name)))
        check_start("start", self.start)
        self._check_momentum()
        for name in _PERIODS:
            check_count(name, getattr(self, name), least=1)
        if self.ascent_dtype is not None:
            check_choice("ascent_dtype", self.ascent_dtype, ASCENT_DTYPES)
        self._check_share("adversarial_fraction", self.adversarial_fraction)
        if self.labelled_capacity is not None:
            self._check_share("labelled_capacity", self.labelled_capacity)
        check_combination(self)

    def _check_members(self, name: str, kind: type, what: str) -> None:
        """A tuple of the field, whose members are of one type."""
        value = getattr(self, name)
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(f"{name}: expected a sequence of {what}, got {value!r}")
        for member in value:
            if isinstance(member, bool) or not isinstance(member, kind):
                raise TypeError(f"{name}: expected {what}, got {member!r}")
        object.__setattr__(self, name, tuple(value))

    @staticmethod
    def _check_share(name: str, value: float) -> None:
        check_magnitude(name, value)
        if not 0 < value <= 1:
            raise ValueError(f"{name}: expected a number > 0 and at most 1, got {value}")

    def _check_momentum(self) -> None:
        momentum = self.proximal_momentum
        number = isinstance(momentum, int | float) and not isinstance(momentum, bool)
        points = check_points("proximal_momentum", ((0.0, momentum),) if number else momentum)
        if any(value > 1 for _, value in points):
            raise ValueError(f"proximal_momentum: expected numbers from 0 to 1, got {momentum!r}")
        if not number:
            object.__setattr__(self, "proximal_momentum", points)

    @property
    def compares(self) -> bool:
        """Whether predictions are read, so that a head is needed."""
        compared = self.alpha > 0 or self.proximal > 0 or (self.adversarial_weight > 0 and self.climbs_divergence)
        return compared or self.climbs_linearity

    @property
    def trains_in_parts(self) -> bool:
        """Whether a step has several backwards, all but the last its own."""
        return self.backward != "final" or self.memory == "low"

    @property
    def climbs_divergence(self) -> bool:
        """Whether the ascent needs the clean prediction."""
        return self.steps > 0 and self.ascent == "divergence"

    @property
    def climbs_linearity(self) -> bool:
        """Whether the step trains on how linear the task's loss is."""
        return self.ascent == "linearity"

    def replace(self, **changes: Any) -> "AdversarialConfig":
        """A copy with some fields changed, validated again."""
        _check_fields(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists; :meth:`from_dict` reads them back."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "AdversarialConfig":
        """The config of these fields; the others have their defaults.

        Args:
            fields: as of :meth:`to_dict`, or some of them.

        Raises:
            TypeError, ValueError: as the constructor; of a field that does not exist the message names those that do.
        """
        _check_fields(fields)
        return cls(**fields)

    def to_json(self) -> str:
        """The fields as a JSON object; :meth:`from_json` reads them back."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "AdversarialConfig":
        """The config of a JSON object.

        Args:
            text: of :meth:`to_json`, or an object with some of the fields.

        Raises:
            TypeError, ValueError: no JSON object, or as :meth:`from_dict`.
        """
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError(f"AdversarialConfig: expected a JSON object, got {type(fields).__name__}")
        return cls.from_dict(fields)


def _check_fields(fields: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(AdversarialConfig)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"AdversarialConfig: unknown fields {', '.join(unknown)}; known are {', '.join(known)}")


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value
