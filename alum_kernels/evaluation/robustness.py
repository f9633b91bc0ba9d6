"""What a model still gets right when its embeddings are attacked.

    delta_0 = uniform in the ball;  K times:  delta <- Pi(delta + step normalise(d task loss / d x)) at x = e + delta

The attack is projected gradient descent in embedding space, on the labels, with a step of a given length whatever the
size of the gradient: sign(g) in the linf ball, g / ||g|| in the l2 ball. Only the perturbed embeddings, leaves made
outside the model, are differentiated.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from alum_kernels.adversarial.heads import Head, detect_head
from alum_kernels.adversarial.hooks import PerturbationHooks, device_of, dropout_off, unwrap
from alum_kernels.adversarial.labels import IGNORED_LABEL, LABEL_KEYS
from alum_kernels.adversarial.sites import perturbed_sites
from alum_kernels.ops.checks import check_choice, check_magnitude
from alum_kernels.ops.noise_init import noise_init
from alum_kernels.ops.projected_ascent import LEVELS, projected_ascent

ATTACKED_HEADS = ("classification", "masked_lm")
ATTACK_NORMS = ("linf", "l2")
_NORMALIZE = {"linf": "sign", "l2": "l2"}


@dataclass(frozen=True)
class RobustnessReport:
    """What :func:`accuracy_under_attack` measured.

    Attributes:
        clean_accuracy: share of the rows that the model gets right.
        attacked_accuracy: share of the rows that it gets right at the clean point and at every point of the attack.
        clean_loss, attacked_loss: mean cross-entropy of the rows, at the clean and at the last attacked point.
        delta_rms: root mean square of an element of the last perturbation, over unmasked positions.
        rows: number of rows, which are samples, or labelled positions of a masked-LM model.
    """

    clean_accuracy: float
    attacked_accuracy: float
    clean_loss: float
    attacked_loss: float
    delta_rms: float
    rows: int


def accuracy_under_attack(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    epsilon: float,
    steps: int = 3,
    step_size: float | None = None,
    norm: str = "linf",
    level: str = "token",
    seed: int = 0,
    modules: Sequence[str] = (),
    head: str | None = None,
    backend: str | None = None,
) -> RobustnessReport:
    """Accuracy and loss of a classifier or masked-LM model, clean and under an attack on its embeddings.

    The model runs in evaluation mode and gets every submodule's own mode back. No parameter's gradient is computed or
    touched. The result is a function of the model, the samples in their order and ``seed``: how the samples are cut
    into batches changes nothing but rounding.

    Args:
        model: a module called as ``model(**batch)``; ``DistributedDataParallel`` around it is seen through.
        batches: arguments of the model, each with ``labels`` (B,), or (B, S) for a masked-LM head, where -100 marks
            what is not counted; an ``attention_mask`` (B, S) says which positions stay as they are. Tensors are moved
            to the model's device.
        epsilon: radius of the ball, in units of the embeddings.
        steps: gradient steps K; the attack costs K + 2 forward and K backward passes a batch. 0 leaves the noise.
        step_size: length of a step; None is 2.5 epsilon / K, so that K steps can cross the ball.
        norm: ``"linf"`` bounds each element by epsilon, ``"l2"`` the Euclidean norm of a group.
        level: the group of the l2 ball: ``"token"``, ``"sequence"`` or ``"batch"`` (which then depends on how samples
            are batched).
        seed: of the random start.
        modules: names of the perturbed modules; empty means the input embeddings, as in :class:`AdversarialConfig`.
        head: ``"classification"`` or ``"masked_lm"``; None recognises it from the model's class.
        backend: of the ops; None picks the fastest that can serve.

    Raises:
        ValueError: an argument out of range, a head without classes, a batch without labels, or nothing to count.
        RuntimeError: a perturbed module did not run exactly once in a forward pass.

    Source: Madry et al., arXiv:1706.06083, section 2.1, in the embedding space of Miyato et al., arXiv:1605.07725.

    Example:
        >>> import torch
        >>> from alum_kernels.evaluation.robustness import accuracy_under_attack
        >>> class Classifier(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = torch.nn.Embedding.from_pretrained(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
        ...         self.bias = torch.nn.Parameter(torch.zeros(2))
        ...     def forward(self, input_ids):
        ...         return self.embed(input_ids).mean(1) + self.bias
        >>> batch = {"input_ids": torch.tensor([[0, 0], [1, 0]]), "labels": torch.tensor([1, 0])}
        >>> report = accuracy_under_attack(
        ...     Classifier(), [batch], epsilon=0.1, modules=("embed",), head="classification"
        ... )
        >>> report.clean_accuracy, report.attacked_accuracy
        (1.0, 0.5)
    """
    check_magnitude("epsilon", epsilon)
    if step_size is not None:
        check_magnitude("step_size", step_size)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps: expected an int >= 0, got {steps!r}")
    check_choice("norm", norm, ATTACK_NORMS)
    check_choice("level", level, LEVELS)
    inner = unwrap(model)
    chosen = detect_head(inner) if head is None else Head(head)
    check_choice("head", chosen.name, ATTACKED_HEADS)
    attack = _Attack(
        model=inner,
        head=chosen,
        hooks=PerturbationHooks(perturbed_sites(inner, modules)),
        epsilon=float(epsilon),
        steps=steps,
        step_size=2.5 * epsilon / max(steps, 1) if step_size is None else float(step_size),
        norm=norm,
        level=level,
        seed=seed,
        backend=backend,
    )
    device = device_of(inner)
    totals, samples = _Totals(*torch.zeros(len(_Totals._fields), dtype=torch.float64, device=device)), 0
    try:
        with dropout_off(inner):
            for batch in batches:
                moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
                sums, size = attack.run(moved, samples)
                totals = _Totals(*map(torch.add, totals, sums))
                samples += size
    finally:
        attack.hooks.remove()
    rows, correct, robust, clean_loss, attacked_loss, delta_squared, elements = torch.stack(totals).tolist()
    if rows == 0:
        raise ValueError("batches: expected at least one labelled row, got none")
    return RobustnessReport(
        clean_accuracy=correct / rows,
        attacked_accuracy=robust / rows,
        clean_loss=clean_loss / rows,
        attacked_loss=attacked_loss / rows,
        delta_rms=math.sqrt(delta_squared / max(elements, 1)),
        rows=int(rows),
    )


class _Totals(NamedTuple):
    """Sums over the rows of a batch, and over the elements of its perturbation: 0-d fp64 tensors."""

    rows: Tensor
    correct: Tensor
    robust: Tensor
    clean_loss: Tensor
    attacked_loss: Tensor
    delta_squared: Tensor
    elements: Tensor


@dataclass(frozen=True)
class _Attack:
    """The attack on one model, with its constants."""

    model: nn.Module
    head: Head
    hooks: PerturbationHooks
    epsilon: float
    steps: int
    step_size: float
    norm: str
    level: str
    seed: int
    backend: str | None

    def run(self, batch: Mapping[str, Any], sample_offset: int) -> tuple[_Totals, int]:
        """Attack one batch, whose first sample is at ``sample_offset``; its sums and its number of samples."""
        inputs = {key: value for key, value in batch.items() if key not in LABEL_KEYS}
        with torch.no_grad(), self.hooks.recording() as embeds:
            logits = self.head.logits(self.model(**inputs))
        labels = _checked_labels(batch, logits)
        counted = labels != IGNORED_LABEL
        correct = counted & (logits.argmax(-1) == labels)
        clean_loss = _cross_entropy_sum(logits, labels)

        masks = [site.valid_positions(batch, embed) for site, embed in zip(self.hooks.sites, embeds, strict=True)]
        points = [self._start(*place, sample_offset) for place in zip(range(len(embeds)), embeds, masks, strict=True)]
        robust = correct
        for step in range(self.steps + 1):
            climbs = step < self.steps
            leaves = [perturbed.requires_grad_(climbs) for perturbed, _ in points]
            with (
                torch.set_grad_enabled(climbs),
                self.hooks.replacing(lambda index, output, leaves=leaves: leaves[index].clone()),
            ):
                logits = self.head.logits(self.model(**inputs))
                loss = _cross_entropy_sum(logits, labels)
            robust = robust & (logits.argmax(-1) == labels)
            if climbs:
                grads = torch.autograd.grad(loss, leaves)
                deltas = [delta for _, delta in points]
                points = [self._ascend(*place) for place in zip(embeds, grads, deltas, masks, strict=True)]

        elements = sum(
            torch.tensor(embed.numel(), device=embed.device) if mask is None else (mask != 0).sum() * embed.shape[2]
            for embed, mask in zip(embeds, masks, strict=True)
        )
        totals = _Totals(
            rows=counted.sum(),
            correct=correct.sum(),
            robust=robust.sum(),
            clean_loss=clean_loss,
            attacked_loss=loss.detach(),
            delta_squared=sum(delta.double().square().sum() for _, delta in points),
            elements=elements,
        )
        return _Totals(*(value.double() for value in totals)), embeds[0].shape[0]

    def _start(self, stream: int, embeds: Tensor, mask: Tensor | None, sample_offset: int) -> tuple[Tensor, Tensor]:
        """(B, S, H) embeddings at a random point of the ball, and the perturbation."""
        return noise_init(
            embeds,
            std=self._half_width(embeds, mask),
            distribution="uniform",
            mask=mask,
            seed=self.seed,
            stream=stream,
            sample_offset=sample_offset,
            return_delta=True,
            backend=self.backend,
        )

    def _ascend(self, embeds: Tensor, grad: Tensor, delta: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return projected_ascent(
            embeds,
            grad,
            delta,
            step_size=self.step_size,
            epsilon=self.epsilon,
            norm=self.norm,
            normalize=_NORMALIZE[self.norm],
            level=self.level,
            mask=mask,
            return_delta=True,
            backend=self.backend,
        )

    def _half_width(self, embeds: Tensor, mask: Tensor | None) -> float | Tensor:
        """Of the uniform start: a cube that lies in the ball, epsilon / sqrt(elements of a group) for l2."""
        batch, length, width = embeds.shape
        if self.norm == "linf":
            return self.epsilon
        if self.level == "token":
            return self.epsilon / math.sqrt(max(width, 1))
        valid = torch.full((batch,), length, device=embeds.device) if mask is None else (mask != 0).sum(1)
        valid = valid if self.level == "sequence" else valid.sum()
        return self.epsilon / torch.sqrt((valid * width).clamp(min=1).to(torch.float32))


def _checked_labels(batch: Mapping[str, Any], logits: Tensor) -> Tensor:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"batch: expected 'labels', whose loss is attacked; got {', '.join(batch) or 'an empty batch'}"
        )
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels: expected shape {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}")
    if labels.is_floating_point():
        raise TypeError(f"labels: expected integers, got {labels.dtype}")
    return labels


def _cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over the counted rows, in fp32 (fp64 for fp64 logits)."""
    rows = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(rows, labels.flatten(), reduction="sum", ignore_index=IGNORED_LABEL)
