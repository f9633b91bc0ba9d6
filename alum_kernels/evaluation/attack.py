"""The search of a ball around a model's embeddings: the loop that every robustness figure shares.

    delta_0 = a random point of the ball
    K times:  delta <- Pi(delta + step_k normalise(d objective / d x))  at x = e + delta

A step has a given length whatever the size of the gradient: sign(g) in the linf ball, g / ||g|| in the l2 ball. Only
the perturbed embeddings, leaves made outside the model, are differentiated. What is climbed, and what is read at each
point, is the caller's.

Steps are multiples of the radius. ``CONSTANT``: 2.5 / K each, so that K steps can cross the ball (Madry et al.,
arXiv:1706.06083). ``DECREASING``: from 2, the diameter, down to 2 / K, so that the first steps choose where in the ball
and the last ones settle there (the reason for which Croce & Hein, arXiv:2003.01690, shrink theirs from 2 on).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alum_kernels.adversarial.heads import Head, detect_head
from alum_kernels.adversarial.hooks import PerturbationHooks
from alum_kernels.adversarial.model_state import device_of, dropout_off, unwrap
from alum_kernels.adversarial.predictions import FP16_GRAD_SCALE
from alum_kernels.adversarial.sites import perturbed_sites
from alum_kernels.ops.checks import check_choice, check_magnitude
from alum_kernels.ops.noise_init import noise_init
from alum_kernels.ops.projected_ascent import LEVELS, projected_ascent

ATTACK_NORMS = ("linf", "l2")
SAMPLE_LEVELS = ("token", "sequence")
"""Groups of the l2 ball in which one sample's perturbation leaves the others' alone."""

CONSTANT, DECREASING = "constant", "decreasing"

Radius = float | Tensor | Callable[[Mapping[str, Any]], Tensor]
"""One radius, or (N,) one for each sample of all batches in order, or a function of a batch that returns (B,)."""

_NORMALIZE = {"linf": "sign", "l2": "l2"}


class Point(NamedTuple):
    """One point of an ascent.

    Attributes:
        values: what was climbed, as the objective returned it.
        logits: of each part of the head.
        deltas: (B, S, H) perturbation of each perturbed module.
    """

    values: Tensor
    logits: list[Tensor]
    deltas: list[Tensor]


class Attack:
    """Searches of a ball around one model's embeddings; a context in which the model is in evaluation mode and hooked.

    Every submodule has its own mode back after the context, and the hooks are gone.

    Args:
        model: a module called as ``model(**batch)``; ``DistributedDataParallel`` around it is seen through.
        heads: names of the heads that can be served.
        levels: groups of the l2 ball that can be served.
        schedule: ``CONSTANT`` or ``DECREASING``, where ``step_size`` is None.
        norm, level, steps, step_size, restarts, seed, modules, head, backend: as the public functions document them.

    Raises:
        ValueError, TypeError: an argument out of range; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        heads: Sequence[str],
        levels: Sequence[str] = LEVELS,
        schedule: str = CONSTANT,
        norm: str,
        level: str,
        steps: int,
        step_size: float | None = None,
        restarts: int = 1,
        seed: int = 0,
        modules: Sequence[str] = (),
        head: str | None = None,
        backend: str | None = None,
    ) -> None:
        check_count("steps", steps, 0)
        check_count("restarts", restarts, 1)
        check_choice("norm", norm, ATTACK_NORMS)
        check_choice("level", level, levels)
        if step_size is not None:
            check_magnitude("step_size", step_size)
        self.model = unwrap(model)
        self.head = detect_head(self.model) if head is None else Head(head)
        check_choice("head", self.head.name, heads)
        self.norm, self.level, self.steps, self.restarts = norm, level, steps, restarts
        self.seed, self.backend = seed, backend
        self._step_size, self._schedule = step_size, schedule
        self.sites = perturbed_sites(self.model, modules)
        self._context = ExitStack()

    def __enter__(self) -> "Attack":
        self.hooks = PerturbationHooks(self.sites)
        self._context.callback(self.hooks.remove)
        self._context.enter_context(dropout_off(self.model))
        return self

    def __exit__(self, *exception: object) -> None:
        self._context.close()

    def subjects(self, batches: Iterable[Mapping[str, Any]], epsilon: Radius | None = None) -> Iterator["Subject"]:
        """Each batch on the model's device, after its clean pass, with its radii if there are any.

        Raises:
            ValueError: no batch, or not one radius for each sample.
        """
        if epsilon is not None:
            check_radius(epsilon, self.norm, self.level)
        device, offset = device_of(self.model), 0
        for batch in batches:
            moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            subject = Subject(self, moved, offset)
            if epsilon is not None:
                subject.epsilon = self._radii(epsilon, moved, subject)
            yield subject
            offset += subject.samples
        if offset == 0:
            raise ValueError("batches: expected at least one sample, got none")
        if isinstance(epsilon, Tensor) and epsilon.shape[0] != offset:
            raise ValueError(f"epsilon: expected one radius for each of {offset} samples, got {epsilon.shape[0]}")

    def step(self, number: int, epsilon: float | Tensor) -> float | Tensor:
        """Length of step ``number`` of K, counted from 0."""
        if self._step_size is not None:
            return self._step_size
        return epsilon * (2.5 / self.steps if self._schedule == CONSTANT else 2 * (1 - number / self.steps))

    def _radii(self, epsilon: Radius, batch: Mapping[str, Any], subject: "Subject") -> float | Tensor:
        if isinstance(epsilon, Tensor):
            found = epsilon[subject.offset : subject.offset + subject.samples]
            if found.shape[0] != subject.samples:
                raise ValueError(
                    f"epsilon: expected one radius for each sample, got {epsilon.shape[0]} "
                    f"for at least {subject.offset + subject.samples}"
                )
        elif callable(epsilon):
            found = epsilon(batch)
            if not isinstance(found, Tensor) or found.shape != (subject.samples,):
                came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"epsilon: expected the function to return shape ({subject.samples},), got {came}")
            check_radius(found, self.norm, self.level)
        else:
            return float(epsilon)
        return found.detach().to(device=device_of(self.model), dtype=torch.float32)


class Subject:
    """One batch under attack: its clean pass, and the points of a search around it.

    Attributes:
        batch: on the model's device, labels included.
        offset, samples: place of the first sample among all, and their number B.
        logits: of each part of the head, the clean predictions.
        embeds, masks: (B, S, H) clean output of each perturbed module, and (B, S) which positions are perturbed.
        epsilon: a radius, or (B,) fp32 one a sample.
    """

    def __init__(self, attack: Attack, batch: Mapping[str, Any], offset: int) -> None:
        self._attack, self.batch, self.offset = attack, batch, offset
        self._inputs = attack.head.inputs(batch, attack.model)
        self.epsilon: float | Tensor = 0.0
        with torch.no_grad(), attack.hooks.recording() as self.embeds:
            self.logits = self._forward()
        self.samples = self.logits[0].shape[0]
        self.masks = [site.valid_positions(batch, own) for site, own in zip(attack.sites, self.embeds, strict=True)]
        for site, embed in zip(attack.sites, self.embeds, strict=True):
            if embed.shape[0] % max(self.samples, 1):
                raise ValueError(
                    f"{site.name}: expected a multiple of {self.samples} sequences, one or more a sample, "
                    f"got {embed.shape[0]}"
                )

    def climb(
        self,
        objective: Callable[[Sequence[Tensor]], Tensor],
        restart: int = 0,
        start: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> Iterator[Point]:
        """The K + 1 points of one ascent, the first of them its start.

        Args:
            objective: of the logits of each part, to values whose sum is climbed.
            restart: which random start; each has its own noise.
            start: embeddings and perturbation of each module to start from instead.
        """
        attack = self._attack
        points = self.uniform_start(restart) if start is None else list(start)
        for step in range(attack.steps + 1):
            climbs = step < attack.steps
            leaves = [perturbed.detach().requires_grad_(climbs) for perturbed, _ in points]
            with (
                torch.set_grad_enabled(climbs),
                attack.hooks.replacing(lambda index, output, leaves=leaves: leaves[index].clone()),
            ):
                logits = self._forward()
                values = objective(logits)
            grads = self._gradients(values, leaves, logits) if climbs else []
            deltas = [delta for _, delta in points]
            yield Point(values.detach(), [one.detach() for one in logits], deltas)
            del logits, values  # the graph of a pass is not held through the next
            if climbs:
                points = [self._ascend(index, grad, deltas[index], step) for index, grad in enumerate(grads)]

    def uniform_start(self, restart: int) -> list[tuple[Tensor, Tensor]]:
        """Of each module the embeddings at a uniform point of the ball (of a cube inside the l2 ball), and delta_0."""
        return [
            noise_init(
                embed,
                std=self._half_width(index),
                distribution="uniform",
                mask=self.masks[index],
                return_delta=True,
                **self._noise(index, restart),
            )
            for index, embed in enumerate(self.embeds)
        ]

    def random_point(self, draw: int) -> list[tuple[Tensor, Tensor]]:
        """Of each module the embeddings at a random point of the ball, and the perturbation.

        In the l2 ball a random direction at full length, where nearly all of a ball of many dimensions lies; in the
        linf ball uniform in every element.
        """
        if self._attack.norm == "linf":
            return self.uniform_start(draw)
        points = []
        for index, (embed, mask) in enumerate(zip(self.embeds, self.masks, strict=True)):
            zero = torch.zeros_like(embed, dtype=torch.promote_types(embed.dtype, torch.float32))
            _, direction = noise_init(zero, std=1.0, mask=mask, return_delta=True, **self._noise(index, draw))
            points.append(self._moved(index, direction, zero, self._of_rows(index)))
        return points

    def delta_norms(self, deltas: Sequence[Tensor]) -> Tensor:
        """(B,) norm of each sample's perturbation: the largest over its groups and modules, fp64."""
        largest = torch.zeros(self.samples, dtype=torch.float64, device=deltas[0].device)
        for delta in deltas:
            if self._attack.norm == "linf":
                norms = delta.abs().flatten(1).amax(1)
            elif self._attack.level == "token":
                norms = torch.linalg.vector_norm(delta, dim=2).amax(1)
            else:
                norms = torch.linalg.vector_norm(delta.flatten(1), dim=1)
            largest = torch.maximum(largest, norms.double().reshape(self.samples, -1).amax(1))
        return largest

    def elements(self) -> Tensor:
        """How many elements are perturbed, over all modules: 0-d."""
        counts = [
            torch.tensor(embed.numel(), device=embed.device) if mask is None else (mask != 0).sum() * embed.shape[2]
            for embed, mask in zip(self.embeds, self.masks, strict=True)
        ]
        return torch.stack(counts).sum()

    def _forward(self) -> list[Tensor]:
        outputs = self._attack.model(**self._inputs)
        return [part.predictions(outputs, self.batch) for part in self._attack.head.parts]

    def _gradients(self, values: Tensor, leaves: list[Tensor], logits: list[Tensor]) -> list[Tensor]:
        """Of the sum, up to a factor: small gradients of fp16 passes are lifted from what fp16 rounds to zero."""
        scale = FP16_GRAD_SCALE if any(one.dtype == torch.float16 for one in logits) else 1.0
        return list(torch.autograd.grad(values.sum() * scale, leaves))

    def _noise(self, index: int, restart: int) -> dict[str, Any]:
        """Noise of one module and restart. A sample of several sequences takes as many places."""
        return {
            "seed": self._attack.seed,
            "stream": index + restart * len(self.embeds),
            "sample_offset": self.offset * self._sequences(index),
            "backend": self._attack.backend,
        }

    def _ascend(self, index: int, grad: Tensor, delta: Tensor, step: int) -> tuple[Tensor, Tensor]:
        return self._moved(index, grad, delta, self._attack.step(step, self._of_rows(index)))

    def _moved(self, index: int, grad: Tensor, delta: Tensor, step_size: float | Tensor) -> tuple[Tensor, Tensor]:
        attack = self._attack
        return projected_ascent(
            self.embeds[index],
            grad,
            delta,
            step_size=step_size,
            epsilon=self._of_rows(index),
            norm=attack.norm,
            normalize=_NORMALIZE[attack.norm],
            level=attack.level,
            mask=self.masks[index],
            return_delta=True,
            backend=attack.backend,
        )

    def _sequences(self, index: int) -> int:
        """Sequences a sample: the choices of a multiple-choice sample are rows of the embeddings."""
        return self.embeds[index].shape[0] // max(self.samples, 1)

    def _of_rows(self, index: int) -> float | Tensor:
        """The radius of each sequence of a module's output."""
        if not isinstance(self.epsilon, Tensor):
            return self.epsilon
        return self.epsilon.repeat_interleave(self._sequences(index))

    def _half_width(self, index: int) -> float | Tensor:
        """Of the uniform start: a cube that lies in the ball, epsilon / sqrt(elements of a group) for l2."""
        embeds, mask, epsilon = self.embeds[index], self.masks[index], self._of_rows(index)
        batch, length, width = embeds.shape
        if self._attack.norm == "linf":
            return epsilon
        if self._attack.level == "token":
            return epsilon / math.sqrt(max(width, 1))
        valid = torch.full((batch,), length, device=embeds.device) if mask is None else (mask != 0).sum(1)
        valid = valid if self._attack.level == "sequence" else valid.sum()
        return epsilon / torch.sqrt((valid * width).clamp(min=1).to(torch.float32))


def check_count(name: str, value: int, least: int) -> None:
    """An int that is at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")


def check_radius(epsilon: Radius, norm: str, level: str) -> None:
    """A radius in any of its forms."""
    if isinstance(epsilon, Tensor):
        if epsilon.dim() != 1 or not epsilon.is_floating_point():
            raise ValueError(
                f"epsilon: expected floating-point numbers of shape (samples,), "
                f"got {epsilon.dtype} of shape {tuple(epsilon.shape)}"
            )
        if not bool(((epsilon >= 0) & epsilon.isfinite()).all()):
            raise ValueError("epsilon: expected finite numbers >= 0")
    elif not callable(epsilon):
        check_magnitude("epsilon", epsilon, "a number, a tensor or a function of a batch")
    if norm == "l2" and level == "batch" and (isinstance(epsilon, Tensor) or callable(epsilon)):
        raise ValueError("epsilon: norm='l2' at level='batch' has one radius for the batch, so expected a number")
