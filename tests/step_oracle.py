"""One training step of any method in float64, written out plainly from the methods' equations.

A perturbation is added to a module's output (or input) by a hook of this file, and gradients are autograd's. Noise and
ascent are those of ``oracle.py``, what is compared is that of ``compared_rows.py``. Without dropout, and without
schedules: a config has the weights and sizes of the moment.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracle
import torch
from compared_rows import Rows, compared, divergences, sample_losses
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from alum_kernels import AdversarialConfig


@dataclass(frozen=True)
class At:
    """A perturbed tensor: the output, or the first input, of a module; ``decoder`` where its tokens are a decoder's."""

    name: str
    on_input: bool = False
    decoder: bool = False


@dataclass
class Written:
    """What a step written by hand gives.

    Attributes:
        loss: the step's loss; of a replay the last one's.
        task_loss: at the clean point, or the mean of the passes where none is clean.
        divergence, adversarial_loss, proximal: parts of the loss, unweighted; None where there is no such part.
        gradients: of every parameter (of a replay the last one's), None where nothing depends on it.
        deltas: at every point that was visited, a list of the sites' (B, S, H) each.
    """

    loss: Tensor
    task_loss: Tensor
    divergence: Tensor | None = None
    adversarial_loss: Tensor | None = None
    proximal: Tensor | None = None
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    deltas: list[list[Tensor]] = field(default_factory=list)


@dataclass
class Problem:
    """A model on a batch of a task, and where it is perturbed.

    ``loss`` computes the task's loss of the model's output; None takes that of the output.
    """

    model: nn.Module
    batch: dict[str, Tensor]
    task: str
    sites: Sequence[At]
    loss: Callable[[Any, dict[str, Tensor]], Tensor] | None = None

    def __post_init__(self) -> None:
        labels = ("labels",) if self.loss is not None else ()
        self.inputs = {key: value for key, value in self.batch.items() if key not in labels}
        ids = self.batch["input_ids"]
        self.choices = ids.shape[1] if ids.dim() == 3 else 1

    def run(self, deltas: Sequence[Tensor] | None = None, *, detach: bool = False) -> Any:
        """The model's output with ``deltas`` added at the sites."""

        def moved(index: int, tensor: Tensor) -> Tensor:
            return tensor if deltas is None else (tensor.detach() if detach else tensor) + deltas[index]

        with self._hooked(moved):
            return self.model(**self.inputs)

    def embeddings(self) -> list[Tensor]:
        """The clean tensors at the sites."""
        seen: dict[int, Tensor] = {}
        with torch.no_grad(), self._hooked(lambda index, tensor: seen.setdefault(index, tensor.clone())):
            self.model(**self.inputs)
        return [seen[index] for index in range(len(self.sites))]

    def task_loss(self, outputs: Any) -> Tensor:
        return outputs.loss if self.loss is None else self.loss(outputs, self.batch)

    def masks(self, config: AdversarialConfig) -> list[Tensor]:
        """(B, S) positions that move, of each site."""
        return [self._mask(site, config.excluded_tokens) for site in self.sites]

    def _mask(self, site: At, excluded: Sequence[int]) -> Tensor:
        if site.decoder:
            return self.batch["labels"] != -100
        ids = self.batch["input_ids"].flatten(0, -2)
        mask = self.batch["attention_mask"].flatten(0, -2) == 1
        for token in excluded:
            mask = mask & (ids != token)
        return mask

    @contextmanager
    def _hooked(self, change: Callable[[int, Tensor], Tensor]):
        handles = []
        for index, site in enumerate(self.sites):
            module = self.model.get_submodule(site.name)

            def before(module: nn.Module, args: tuple, index: int = index) -> tuple:
                return (change(index, args[0]), *args[1:])

            def after(module: nn.Module, args: tuple, output: Tensor, index: int = index) -> Tensor:
                return change(index, output)

            handles.append(
                module.register_forward_pre_hook(before) if site.on_input else module.register_forward_hook(after)
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class Sizes:
    """(B, S) sizes of one site: an element of the noise, the length of the noise, of a step, and of the radius."""

    noise: Tensor
    noise_length: Tensor
    step: Tensor
    radius: Tensor


def single(number: float) -> np.float32:
    """Constants are fp32 on the device."""
    return np.float32(number)


def sizes(config: AdversarialConfig, embeds: Tensor, mask: Tensor, choices: int) -> Sizes:
    """Sizes by the definitions of ``noise_level`` and ``units``, one group after the other.

    A group's root mean square is float64 here, and fp32 in a step.
    """
    batch, length = embeds.shape[:2]
    b, s = np.indices((batch, length))
    number = {"token": b * length + s, "sequence": b, "sample": b // choices, "batch": 0 * b}[config.level]
    found = np.zeros((4, batch, length))
    for group in np.unique(number):
        own = number == group
        tokens = embeds[torch.from_numpy(own) & mask]
        n = single(max(tokens.numel(), 1))
        if config.units == "std":
            tokens = tokens - tokens.mean(-1, keepdim=True)
        rms = 1.0 if config.units == "absolute" else float(tokens.square().sum() / max(tokens.numel(), 1)) ** 0.5
        norm = 1.0 if config.units == "absolute" else rms * math.sqrt(tokens.numel())
        std, step, radius = single(config.std), single(config.step_size), single(config.epsilon)
        if config.noise_level == "element":
            noise, noise_norm = std * rms, std * np.sqrt(n) * rms
        else:  # std is a length of all elements together
            noise, noise_norm = std / np.sqrt(n) * norm, std * norm
        found[0][own] = noise
        found[1][own] = noise_norm if config.normalize == "l2" else noise
        found[2][own] = step * (norm if config.normalize == "l2" else rms)
        found[3][own] = radius * (norm if config.norm == "l2" else rms)
    return Sizes(*torch.from_numpy(found))


class Climb:
    """delta of every site, from the noise on."""

    def __init__(
        self, problem: Problem, config: AdversarialConfig, seed: int, sample_offset: int, initial: list[Tensor] | None
    ) -> None:
        self._config, self._choices = config, problem.choices if config.level == "sample" else 1
        self._masks = problem.masks(config)
        embeds = problem.embeddings()
        sites = zip(embeds, self._masks, strict=True)
        self._sizes = [sizes(config, tensor, mask, problem.choices) for tensor, mask in sites]
        offset = sample_offset * problem.choices
        self.deltas = []
        for index, (tensor, mask, size) in enumerate(zip(embeds, self._masks, self._sizes, strict=True)):
            unit = oracle.unit_noise(tuple(tensor.shape), seed, config.distribution, index, offset)
            delta = unit * size.noise.unsqueeze(-1) if initial is None else initial[index]
            self.deltas.append(delta * mask.unsqueeze(-1))

    def leaves(self) -> list[Tensor]:
        return [delta.clone().requires_grad_() for delta in self.deltas]

    def up(self, grads: Sequence[Tensor], *, last: bool) -> None:
        """delta <- Pi(delta + step normalise(g)); a replacing step has the noise's length but for the last one."""
        config = self._config
        replaces = config.update == "replace"
        whole = last or not replaces
        for index, (grad, mask, size) in enumerate(zip(grads, self._masks, self._sizes, strict=True)):
            delta = torch.zeros_like(grad) if replaces else self.deltas[index]
            climbed, _ = oracle.ascend(
                self._joined(grad),
                self._joined(delta),
                step_size=self._joined(size.step if whole else size.noise_length),
                epsilon=self._joined(size.radius),
                norm=config.norm if whole else "none",
                normalize=config.normalize,
                level="sequence" if config.level == "sample" else config.level,
                mask=self._joined(mask),
            )
            self.deltas[index] = climbed.view_as(grad)

    def _joined(self, tensor: Tensor) -> Tensor:
        """The choices of a sample one after the other in one row."""
        rows, length, *rest = tensor.shape
        return tensor.reshape(rows // self._choices, self._choices * length, *rest)


def step(
    problem: Problem,
    config: AdversarialConfig,
    seed: int,
    *,
    sample_offset: int = 0,
    initial: list[Tensor] | None = None,
    teacher: nn.Module | None = None,
    learning_rate: float = 0.0,
    first_layer: str | None = None,
) -> Written:
    """A step of ``config`` on ``problem``.

    Args:
        problem: the model is as before afterwards, but for a replay, which updates it.
        config: the method.
        seed: of the noise.
        sample_offset: of the noise.
        initial: first perturbations instead of the noise.
        teacher: model of the proximal term.
        learning_rate: of plain gradient descent between replays.
        first_layer: module whose output the inner steps of YOPO end at.
    """
    climb = Climb(problem, config, seed, sample_offset, initial)
    if config.ascent == "linearity":
        with sdpa_kernel(SDPBackend.MATH):  # other attention has no second derivative
            return _trained_to_be_linear(problem, config, climb)
    if config.backward == "final":
        return _trained_at_the_end(problem, config, climb, teacher)
    return _trained_on_the_way(problem, config, climb, learning_rate, first_layer)


def _trained_at_the_end(
    problem: Problem, config: AdversarialConfig, climb: Climb, teacher: nn.Module | None
) -> Written:
    options = {"temperature": config.temperature}

    def rows(outputs: Any) -> list[Rows]:
        return compared(problem.task, outputs, problem.batch, config.positions)

    clean = problem.run()
    fixed = problem.run() if config.ascent == "divergence" else None
    visited = [list(climb.deltas)]
    for k in range(config.steps):
        leaves = climb.leaves()
        outputs = problem.run(leaves)
        if config.ascent == "task":
            total = problem.task_loss(outputs)
        else:
            constant = [[part.detach() for part in head] for head in rows(fixed)]
            climbed = divergences(problem.task, rows(outputs), constant, divergence=config.ascent_divergence, **options)
            total = sum(row.sum() for row in climbed)
        climb.up(torch.autograd.grad(total, leaves), last=k == config.steps - 1)
        visited.append(list(climb.deltas))

    task_loss = problem.task_loss(clean)
    parts, written = [(config.clean_weight, task_loss)], Written(task_loss, task_loss, deltas=visited)
    adv = problem.run(climb.deltas, detach=config.detach_embeddings)
    if config.adversarial_weight > 0:
        written.adversarial_loss = problem.task_loss(adv)
        parts.append((config.adversarial_weight, written.adversarial_loss))
        climbs_from_clean = config.steps > 0 and config.ascent == "divergence"
        if not (config.clean_weight or config.alpha or climbs_from_clean or teacher):
            written.task_loss = written.adversarial_loss
    if config.alpha > 0:
        heads = divergences(
            problem.task, rows(adv), rows(clean), divergence=config.divergence, gradient=config.gradient, **options
        )
        written.divergence = sum(head.mean() for head in heads)
        parts.append((config.alpha, written.divergence))
    if teacher is not None:
        with torch.no_grad():
            taught = rows(teacher(**problem.inputs))
        heads = divergences(problem.task, rows(clean), taught, divergence=config.divergence, **options)
        written.proximal = sum(head.mean() for head in heads)
        parts.append((config.proximal, written.proximal))
    written.loss = sum(weight * part for weight, part in parts if weight > 0)
    written.gradients = _gradients(problem.model, written.loss)
    return written


def _trained_on_the_way(
    problem: Problem, config: AdversarialConfig, climb: Climb, learning_rate: float, first_layer: str | None
) -> Written:
    replays = config.backward == "replay"
    weight = config.adversarial_weight / (1 if replays else config.steps + 1)
    total: dict[str, Tensor | None] = {}
    losses, visited = [], [list(climb.deltas)]
    for t in range(config.steps + 1):
        leaves = climb.leaves()
        layer: list[Tensor] = []
        with _watched(problem.model, first_layer, layer):
            loss = problem.task_loss(problem.run(leaves, detach=config.detach_embeddings))
        losses.append(loss.detach())
        own = _gradients(problem.model, weight * loss)
        total = own if replays or not total else {name: _sum(total[name], grad) for name, grad in own.items()}
        if t == config.steps:
            break
        if not config.inner_steps:
            climb.up(torch.autograd.grad(loss, leaves), last=True)
        else:
            (p,) = torch.autograd.grad(loss, layer)
            for _ in range(config.inner_steps):
                leaves, reached = climb.leaves(), []
                with _watched(problem.model, first_layer, reached):
                    problem.run(leaves)
                climb.up(torch.autograd.grad((p * reached[0]).sum(), leaves), last=True)
        visited.append(list(climb.deltas))
        if replays:
            with torch.no_grad():
                for name, parameter in problem.model.named_parameters():
                    parameter -= 0 if own[name] is None else learning_rate * own[name]
    mean = torch.stack(losses).mean()
    whole = weight * (losses[-1] if replays else torch.stack(losses).sum())
    return Written(whole, mean, adversarial_loss=mean, gradients=total, deltas=visited)


def _trained_to_be_linear(problem: Problem, config: AdversarialConfig, climb: Climb) -> Written:
    def losses(deltas: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        outputs = problem.run(deltas, detach=config.detach_embeddings and deltas is not here)
        return problem.task_loss(outputs), *sample_losses(problem.task, outputs, problem.batch)

    def along(deltas: list[Tensor], slopes: Sequence[Tensor]) -> Tensor:
        """(B,) delta . g, of all rows and sites of a sample."""
        parts = zip(deltas, slopes, strict=True)
        return sum((delta * slope).reshape(len(clean), -1).sum(1) for delta, slope in parts)

    here = [torch.zeros_like(delta).requires_grad_() for delta in climb.deltas]
    task_loss, clean, labels = losses(here)
    slopes = torch.autograd.grad(clean.sum(), here, create_graph=True)
    fixed = [slope.detach() for slope in slopes]
    visited = [list(climb.deltas)]
    for k in range(config.steps):
        leaves = climb.leaves()
        gamma = (losses(leaves)[1] - clean.detach() - along(leaves, fixed)).abs()
        climb.up(torch.autograd.grad(gamma.sum(), leaves), last=k == config.steps - 1)
        visited.append(list(climb.deltas))
    slope = along(climb.deltas, slopes)
    gamma = (losses(climb.deltas)[1] - clean - slope).abs()
    loss = config.clean_weight * task_loss
    terms = config.linearity * gamma + config.linearity_gradient * slope.abs()
    loss = loss + (terms * labels).sum() / labels.sum()
    return Written(loss, task_loss, gradients=_gradients(problem.model, loss), deltas=visited)


@contextmanager
def _watched(model: nn.Module, name: str | None, seen: list[Tensor]):
    """Within the context the module's output is appended to ``seen``."""
    if name is None:
        yield
        return

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = model.get_submodule(name).register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return dict(zip(names, grads, strict=True))


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right
