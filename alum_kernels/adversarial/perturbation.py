"""The perturbation of one step, from its seed to delta_K.

Several sites may be perturbed at once; each has its own stream of noise, its own gradient and its own delta.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alum_kernels.adversarial.config import AdversarialConfig
from alum_kernels.adversarial.sites import Site, choices_of
from alum_kernels.ops.noise_init import noise_init
from alum_kernels.ops.projected_ascent import STATISTICS, projected_ascent

SIZES = ("std", "step_size", "epsilon")
Initial = Tensor | Callable[[tuple[int, ...]], Tensor]


class DeviceConstants:
    """The config's magnitudes, times the factor of its schedule, and its excluded tokens, as tensors on each device.

    A float would recompile per value under ``torch.compile`` and freeze in a captured CUDA graph, and a list would be
    copied to the device in every step; a new factor is written into the tensors that exist.
    """

    def __init__(self, config: AdversarialConfig) -> None:
        self._values = {name: getattr(config, name) for name in SIZES}
        self._excluded = config.excluded_tokens
        self._factor = 1.0
        self._tensors: dict[tuple[str, torch.device], Tensor] = {}
        self._tokens: dict[torch.device, Tensor] = {}

    def scale(self, factor: float) -> None:
        """Multiply every magnitude by ``factor`` from here on."""
        if factor != self._factor:
            self._factor = factor
            for (name, _), tensor in self._tensors.items():
                tensor.fill_(self._values[name] * factor)

    def __call__(self, name: str, device: torch.device) -> Tensor:
        """A magnitude, 0-d fp32."""
        key = (name, device)
        if key not in self._tensors:
            value = self._values[name] * self._factor
            self._tensors[key] = torch.full((), value, dtype=torch.float32, device=device)
        return self._tensors[key]

    def excluded_tokens(self, device: torch.device) -> Tensor | None:
        """Token ids that stay as they are, int64; None if there are none."""
        if not self._excluded:
            return None
        if device not in self._tokens:
            self._tokens[device] = torch.tensor(self._excluded, device=device)
        return self._tokens[device]


class Perturbation:
    """Draws delta_0, climbs with the gradients it is given, and perturbs the tensors at the sites.

    Args:
        config: the method and its constants.
        constants: the same constants on the device.
        sites: what is perturbed.
        batch: arguments of the model, labels included; its masks and tokens say which positions stay as they are.
        seed: one-element int64 tensor.
        sample_offset: place of the batch's first sample in the global batch.
        initial: a first perturbation for each site, (B, S, H) fp32 (fp64 for fp64 embeddings), instead of noise; or a
            function that makes it for that shape.
    """

    def __init__(
        self,
        config: AdversarialConfig,
        constants: DeviceConstants,
        sites: Sequence[Site],
        batch: Mapping[str, Any],
        seed: Tensor,
        sample_offset: int,
        initial: Sequence[Initial] | None = None,
    ) -> None:
        if initial is not None and len(initial) != len(sites):
            raise ValueError(f"delta: expected one tensor for each of {len(sites)} sites, got {len(initial)}")
        self._config = config
        self._seed, self._choices = seed, choices_of(batch)
        self._sample_offset = sample_offset * self._choices
        starts = [None] * len(sites) if initial is None else initial
        self._sites = [
            _SitePerturbation(config, constants, site, batch, self._choices, start)
            for site, start in zip(sites, starts, strict=True)
        ]
        self._grads: Sequence[Tensor] | None = None
        self._final_deltas: list[Tensor | None] = [None] * len(sites)
        self._statistics: list[Tensor] = []

    @property
    def recorded(self) -> bool:
        """Whether the clean tensors are known."""
        return all(own.embeds is not None for own in self._sites)

    def record(self, index: int, embeds: Tensor) -> None:
        """Take the clean (B, S, H) tensor at a site, detached."""
        self._sites[index].record(embeds)

    def leaf(self, index: int) -> Tensor:
        """The tensor of a site at the next point, made outside the model, to be differentiated."""
        own = self._sites[index]
        if self._grads is None:
            return self._here(index, own.embeds, keep=own.keeps_delta).requires_grad_()
        perturbed, own.delta = self._ascend(index, own.embeds, last=False, return_delta=True)
        return perturbed.requires_grad_()

    def climb(self, grads: Sequence[Tensor]) -> None:
        """Take the gradients at the present point; the next one goes along them."""
        self._grads = grads

    def stay(self) -> None:
        """The next point is the present one."""
        self._grads = None

    def perturb(
        self, index: int, output: Tensor, *, last: bool = True, telemetry: bool = False, keep_delta: bool = False
    ) -> Tensor:
        """A site's live tensor at the next point; the gradient to it is the identity, unless the config detaches it.

        ``last`` is the point that the step ends at. ``telemetry`` collects the statistics of :meth:`figures`,
        ``keep_delta`` what :meth:`halved` and :attr:`final_deltas` need.
        """
        own = self._sites[index]
        if own.embeds is None:
            own.record(output.detach())
        if self._config.detach_embeddings:
            output = output.detach()
        if self._grads is None:
            perturbed = self._here(index, output, keep=keep_delta or not last or own.keeps_delta)
            if keep_delta:
                self._final_deltas[index] = own.delta
            return perturbed
        keep = keep_delta or not last
        results = self._ascend(index, output, last=last, return_delta=keep, return_stats=telemetry)
        if not (telemetry or keep):
            return results
        perturbed, *rest = results
        if keep:
            own.delta = self._final_deltas[index] = rest.pop(0)
        if telemetry:
            self._statistics.append(rest.pop(0))
        return perturbed

    def halved(self, index: int, output: Tensor) -> Tensor:
        """A site's tensor at half the final perturbation."""
        delta = self._final_deltas[index]
        return _moved(output, delta / 2)

    @property
    def final_deltas(self) -> list[Tensor]:
        """delta_K of each site, (B, S, H), where :meth:`perturb` was to keep it."""
        return [delta for delta in self._final_deltas if delta is not None]

    def figures(self) -> dict[str, Tensor]:
        """Sums over sites, sequences and positions, for the telemetry; empty where nothing climbed."""
        if not self._statistics:
            return {}
        total = sum(statistics.sum((0, 1)) for statistics in self._statistics)
        elements = sum(own.elements().sum() for own in self._sites)
        return {**dict(zip(STATISTICS, total, strict=True)), "elements": elements}

    def _here(self, index: int, embeds: Tensor, *, keep: bool) -> Tensor:
        """The tensor at the present point, which is the noise until something climbed."""
        own = self._sites[index]
        if own.delta is not None:
            return _moved(embeds, own.delta)
        result = noise_init(
            embeds, seed=self._seed, std=own.noise_size(), mask=own.mask, return_delta=keep, **self._noise(index)
        )
        if not keep:
            return result
        perturbed, own.delta = result
        return perturbed

    def _ascend(
        self, index: int, embeds: Tensor, *, last: bool, return_delta: bool = False, return_stats: bool = False
    ) -> Any:
        own, config = self._sites[index], self._config
        replaces = config.update == "replace"
        drawn = replaces or own.delta is None
        wanted = {"return_delta": return_delta, "return_stats": return_stats}
        results = projected_ascent(
            own.grouped(embeds),
            own.grouped(self._grads[index]),
            None if drawn else own.grouped(own.delta),
            seed=self._seed if drawn else None,
            std=own.noise_size() if drawn and not replaces else 0.0,
            step_size=own.step_size() if last or not replaces else own.noise_length(),
            epsilon=own.radius(),
            norm=config.norm if last or not replaces else "none",
            normalize=config.normalize,
            level=own.level,
            mask=None if own.mask is None else own.grouped(own.mask),
            **wanted,
            **self._noise(index),
        )
        if not any(wanted.values()):
            return results.view_as(embeds)
        perturbed, *rest = results
        if return_delta:
            rest[0] = rest[0].view_as(embeds)
        return perturbed.view_as(embeds), *rest

    def _noise(self, index: int) -> dict[str, Any]:
        return {
            "distribution": self._config.distribution,
            "stream": index,
            "sample_offset": self._sample_offset,
            "backend": self._config.backend,
        }


class _SitePerturbation:
    """One site: its clean tensor, which of its positions move and how far, and its perturbation so far."""

    def __init__(
        self,
        config: AdversarialConfig,
        constants: DeviceConstants,
        site: Site,
        batch: Mapping[str, Any],
        choices: int,
        initial: Initial | None,
    ) -> None:
        self._config, self._constants, self._site, self._batch = config, constants, site, batch
        self._choices = choices if config.level == "sample" else 1
        self.level = "sequence" if config.level == "sample" else config.level
        self.embeds: Tensor | None = None
        self.mask: Tensor | None = None
        self.delta: Tensor | None = None
        self._initial = initial
        self._elements: Tensor | None = None
        self._unit: Tensor | None = None

    @property
    def keeps_delta(self) -> bool:
        """Whether the noise must be stored: where groups join rows, the ascent cannot draw it again."""
        return self._choices > 1

    def record(self, embeds: Tensor) -> None:
        """Take the clean tensor."""
        self.embeds = embeds
        self.mask = self._site.valid_positions(self._batch, embeds, self._constants.excluded_tokens(embeds.device))
        self._elements = None
        self._unit = None if self._config.units == "absolute" else self._size_of_elements()
        self.delta = None if self._initial is None else self._masked(self._initial)

    def grouped(self, tensor: Tensor) -> Tensor:
        """(B, C S, ...) of (B C, S, ...), where the rows of a sample are one group."""
        if self._choices == 1:
            return tensor
        rows, length, *rest = tensor.shape
        return tensor.reshape(rows // self._choices, self._choices * length, *rest)

    def _masked(self, initial: Initial) -> Tensor:
        """A perturbation handed in, zero where nothing may move."""
        delta = initial(tuple(self.embeds.shape)) if callable(initial) else initial
        dtype = torch.promote_types(self.embeds.dtype, torch.float32)
        if delta.shape != self.embeds.shape:
            raise ValueError(f"delta: expected shape {tuple(self.embeds.shape)}, got {tuple(delta.shape)}")
        delta = delta.to(dtype)
        return delta if self.mask is None else torch.where(self.mask.unsqueeze(-1) != 0, delta, 0)

    def elements(self) -> Tensor:
        """How many elements of each group move: (B, S), (B,) or 0-d, fp32."""
        if self._elements is None:
            grouped = self.grouped(self.embeds)
            if self.mask is None:
                valid = torch.ones(grouped.shape[:2], device=grouped.device)
            else:
                valid = (self.grouped(self.mask) != 0).float()
            self._elements = self._over_group(valid) * grouped.shape[2]
        return self._elements

    def noise_size(self) -> Tensor:
        """Size of an element of the noise, for the (B C, S, H) tensor."""
        size = self._noise_element()
        return size.repeat_interleave(self._choices) if self._choices > 1 and size.dim() == 1 else size

    def noise_length(self) -> Tensor:
        """The noise's size as the length of a step."""
        size = self._noise_element()
        return size * self.elements().clamp(min=1).sqrt() if self._config.normalize == "l2" else size

    def _noise_element(self) -> Tensor:
        size = self._constants("std", self.embeds.device)
        if self._unit is not None:
            # of a group, std is a share of its norm, which the root of its elements spreads: the same for an element
            return size * self._unit
        return size / self.elements().clamp(min=1).sqrt() if self._config.noise_level == "group" else size

    def step_size(self) -> Tensor:
        size = self._constants("step_size", self.embeds.device)
        return size if self._unit is None else size * self._length_unit(self._config.normalize)

    def radius(self) -> Tensor:
        size = self._constants("epsilon", self.embeds.device)
        return size if self._unit is None else size * self._length_unit(self._config.norm)

    def _length_unit(self, norm: str) -> Tensor:
        """What a length is a multiple of: an element's size, or by the Euclidean norm that of a group."""
        return self._unit * self.elements().sqrt() if norm == "l2" else self._unit

    def _size_of_elements(self) -> Tensor:
        """Root mean square of the clean elements of each group, fp32."""
        embeds = self.grouped(self.embeds).to(torch.float32)
        if self._config.units == "std":
            embeds = embeds - embeds.mean(-1, keepdim=True)
        squares = (embeds**2).sum(-1)
        if self.mask is not None:
            squares = torch.where(self.grouped(self.mask) != 0, squares, 0)
        return (self._over_group(squares) / self.elements().clamp(min=1)).sqrt()

    def _over_group(self, tokens: Tensor) -> Tensor:
        """Sum of (B, S) over each group."""
        return {"token": lambda: tokens, "sequence": lambda: tokens.sum(1), "batch": tokens.sum}[self.level]()


def _moved(embeds: Tensor, delta: Tensor) -> Tensor:
    """embeds + delta in the perturbation's precision, rounded once to that of the embeddings."""
    return (embeds.to(delta.dtype) + delta).to(embeds.dtype)
