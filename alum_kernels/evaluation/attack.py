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
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alum_kernels.adversarial.heads import HEADS, Head, head_of
from alum_kernels.adversarial.hooks import PerturbationHooks
from alum_kernels.adversarial.model_state import device_of, dropout_off, unwrap
from alum_kernels.adversarial.predictions import FP16_GRAD_SCALE
from alum_kernels.adversarial.sites import perturbed_sites
from alum_kernels.evaluation.search import INDEPENDENT_LEVELS, Radius, Search, check_radius
from alum_kernels.ops.checks import check_choice
from alum_kernels.ops.noise_init import noise_init
from alum_kernels.ops.projected_ascent import projected_ascent

CONSTANT, DECREASING = "constant", "decreasing"

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


@contextmanager
def attacking(
    model: nn.Module,
    search: Search,
    *,
    heads: Sequence[str] = HEADS,
    levels: Sequence[str] = INDEPENDENT_LEVELS,
    schedule: str = DECREASING,
) -> Iterator["Attack"]:
    """Within the context, the model is hooked and in evaluation mode; afterwards every submodule has its mode back.

    Args:
        model: a module called as ``model(**batch)``; ``DistributedDataParallel`` around it is seen through.
        search: how its balls are searched.
        heads: names of the heads that can be served.
        levels: groups of the l2 ball that can be served.
        schedule: ``CONSTANT`` or ``DECREASING``, where ``search.step_size`` is None.

    Raises:
        ValueError: a head, level or module that cannot be served; the message names it.
    """
    check_choice("level", search.level, levels)
    model = unwrap(model)
    head = head_of(model, search.head)
    check_choice("head", head.name, heads)
    hooks = PerturbationHooks(perturbed_sites(model, search.modules))
    try:
        with dropout_off(model):
            yield Attack(model, head, search, schedule, hooks)
    finally:
        hooks.remove()


@dataclass(frozen=True, eq=False)
class Attack:
    """Searches of balls around the embeddings of one model, hooked by :func:`attacking`.

    Attributes:
        model: without a wrapper.
        head: what it predicts.
        search, schedule: how a ball is searched, and which steps it takes.
        hooks: at its perturbed modules.
    """

    model: nn.Module
    head: Head
    search: Search
    schedule: str
    hooks: PerturbationHooks

    def subjects(
        self, batches: Iterable[Mapping[str, Any]], epsilon: Radius
    ) -> Iterator[tuple["Subject", float | Tensor]]:
        """Each batch on the model's device, after its clean pass, with its radius or (B,) fp32 radii.

        Raises:
            ValueError: no batch, or not one radius for each sample.
        """
        check_radius(epsilon, self.search.norm, self.search.level)
        device, offset = device_of(self.model), 0
        for batch in batches:
            moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            subject = Subject(self, moved, offset)
            yield subject, self._radii(epsilon, subject)
            offset += subject.samples
        if offset == 0:
            raise ValueError("batches: expected at least one sample, got none")
        if isinstance(epsilon, Tensor) and epsilon.shape[0] != offset:
            raise ValueError(f"epsilon: expected one radius for each of {offset} samples, got {epsilon.shape[0]}")

    def step(self, number: int, epsilon: float | Tensor) -> float | Tensor:
        """Length of step ``number`` of K, counted from 0."""
        if self.search.step_size is not None:
            return self.search.step_size
        steps = self.search.steps
        return epsilon * (2.5 / steps if self.schedule == CONSTANT else 2 * (1 - number / steps))

    def _radii(self, epsilon: Radius, subject: "Subject") -> float | Tensor:
        if isinstance(epsilon, Tensor):
            found = epsilon[subject.offset : subject.offset + subject.samples]
            if found.shape[0] != subject.samples:
                raise ValueError(
                    f"epsilon: expected one radius for each sample, got {epsilon.shape[0]} "
                    f"for at least {subject.offset + subject.samples}"
                )
        elif callable(epsilon):
            found = epsilon(subject.batch)
            if not isinstance(found, Tensor) or found.shape != (subject.samples,):
                came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"epsilon: expected the function to return shape ({subject.samples},), got {came}")
            check_radius(found, self.search.norm, self.search.level)
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
    """

    def __init__(self, attack: Attack, batch: Mapping[str, Any], offset: int) -> None:
        self._attack, self.batch, self.offset = attack, batch, offset
        self._inputs = attack.head.inputs(batch, attack.model)
        with torch.no_grad(), attack.hooks.recording() as self.embeds:
            self.logits = self._forward()
        self.samples = self.logits[0].shape[0]
        self.masks = [
            site.valid_positions(batch, own) for site, own in zip(attack.hooks.sites, self.embeds, strict=True)
        ]
        for site, embed in zip(attack.hooks.sites, self.embeds, strict=True):
            if embed.shape[0] % max(self.samples, 1):
                raise ValueError(
                    f"{site.name}: expected a multiple of {self.samples} sequences, one or more a sample, "
                    f"got {embed.shape[0]}"
                )

    def climb(
        self,
        objective: Callable[[Sequence[Tensor]], Tensor],
        epsilon: float | Tensor,
        points: list[tuple[Tensor, Tensor]],
    ) -> Iterator[Point]:
        """The K + 1 points of one ascent, the first of them its start.

        Args:
            objective: of the logits of each part, to values whose sum is climbed.
            epsilon: radius of the ball, or (B,) fp32 one a sample.
            points: of each module the embeddings and the perturbation at the start.
        """
        attack, steps = self._attack, self._attack.search.steps
        for step in range(steps + 1):
            climbs = step < steps
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
                length = attack.step(step, epsilon)
                points = [self._moved(index, grad, deltas[index], length, epsilon) for index, grad in enumerate(grads)]

    def uniform_start(self, epsilon: float | Tensor, restart: int) -> list[tuple[Tensor, Tensor]]:
        """Of each module the embeddings at a uniform point of the ball (of a cube inside the l2 ball), and delta_0."""
        return [
            noise_init(
                embed,
                std=self._half_width(index, epsilon),
                distribution="uniform",
                mask=self.masks[index],
                return_delta=True,
                **self._noise(index, restart),
            )
            for index, embed in enumerate(self.embeds)
        ]

    def random_point(self, epsilon: float | Tensor, draw: int) -> list[tuple[Tensor, Tensor]]:
        """Of each module the embeddings at a random point of the ball, and the perturbation.

        In the l2 ball a random direction at full length, where nearly all of a ball of many dimensions lies; in the
        linf ball uniform in every element.
        """
        if self._attack.search.norm == "linf":
            return self.uniform_start(epsilon, draw)
        points = []
        for index, (embed, mask) in enumerate(zip(self.embeds, self.masks, strict=True)):
            zero = torch.zeros_like(embed, dtype=torch.promote_types(embed.dtype, torch.float32))
            _, direction = noise_init(zero, std=1.0, mask=mask, return_delta=True, **self._noise(index, draw))
            points.append(self._moved(index, direction, zero, epsilon, epsilon))
        return points

    def delta_norms(self, deltas: Sequence[Tensor]) -> Tensor:
        """(B,) norm of each sample's perturbation: the largest over its groups and modules, fp64."""
        largest = torch.zeros(self.samples, dtype=torch.float64, device=deltas[0].device)
        for delta in deltas:
            if self._attack.search.norm == "linf":
                norms = delta.abs().flatten(1).amax(1)
            elif self._attack.search.level == "token":
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
        return list(torch.autograd.grad(values, leaves, torch.full_like(values, scale)))

    def _noise(self, index: int, restart: int) -> dict[str, Any]:
        """Noise of one module and restart. A sample of several sequences takes as many places."""
        return {
            "seed": self._attack.search.seed,
            "stream": index + restart * len(self.embeds),
            "sample_offset": self.offset * self._sequences(index),
            "backend": self._attack.search.backend,
        }

    def _moved(
        self, index: int, grad: Tensor, delta: Tensor, step_size: float | Tensor, epsilon: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        search = self._attack.search
        return projected_ascent(
            self.embeds[index],
            grad,
            delta,
            step_size=self._of_rows(index, step_size),
            epsilon=self._of_rows(index, epsilon),
            norm=search.norm,
            normalize=_NORMALIZE[search.norm],
            level=search.level,
            mask=self.masks[index],
            return_delta=True,
            backend=search.backend,
        )

    def _sequences(self, index: int) -> int:
        """Sequences a sample: the choices of a multiple-choice sample are rows of the embeddings."""
        return self.embeds[index].shape[0] // max(self.samples, 1)

    def _of_rows(self, index: int, of_samples: float | Tensor) -> float | Tensor:
        """A number, or (B,) numbers of samples as one of each sequence of a module's output."""
        if not isinstance(of_samples, Tensor):
            return of_samples
        return of_samples.repeat_interleave(self._sequences(index))

    def _half_width(self, index: int, epsilon: float | Tensor) -> float | Tensor:
        """Of the uniform start: a cube that lies in the ball, epsilon / sqrt(elements of a group) for l2."""
        embeds, mask, radii = self.embeds[index], self.masks[index], self._of_rows(index, epsilon)
        batch, length, width = embeds.shape
        search = self._attack.search
        if search.norm == "linf":
            return radii
        if search.level == "token":
            return radii / math.sqrt(max(width, 1))
        valid = torch.full((batch,), length, device=embeds.device) if mask is None else (mask != 0).sum(1)
        valid = valid if search.level == "sequence" else valid.sum()
        return radii / torch.sqrt((valid * width).clamp(min=1).to(torch.float32))
