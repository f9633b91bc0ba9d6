"""The perturbation of one step, from its seed to delta_K.

Several modules may be perturbed at once; each has its own stream of noise, its own gradient and its own delta.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alum_kernels.adversarial.config import AdversarialConfig
from alum_kernels.ops.noise_init import noise_init
from alum_kernels.ops.projected_ascent import STATISTICS, projected_ascent


class DeviceConstants:
    """The config's magnitudes as 0-d fp32 tensors, one a device.

    A float would recompile per value under ``torch.compile`` and freeze in a captured CUDA graph.
    """

    def __init__(self, config: AdversarialConfig) -> None:
        self._config = config
        self._tensors: dict[tuple[str, torch.device], Tensor] = {}

    def __call__(self, name: str, device: torch.device) -> Tensor:
        key = (name, device)
        if key not in self._tensors:
            self._tensors[key] = torch.full((), getattr(self._config, name), dtype=torch.float32, device=device)
        return self._tensors[key]


class Perturbation:
    """Draws delta_0, climbs with the gradients it is given, and perturbs module outputs.

    Args:
        config: the method and its constants.
        constants: the same constants on the device.
        embeds: (B, S, H) detached clean output of each perturbed module.
        batch: arguments of the model; its attention masks say which positions stay as they are.
        seed: one-element int64 tensor.
        sample_offset: place of the batch's first sample in the global batch.
    """

    def __init__(
        self,
        config: AdversarialConfig,
        constants: DeviceConstants,
        embeds: Sequence[Tensor],
        batch: Mapping[str, Any],
        seed: Tensor,
        sample_offset: int,
    ) -> None:
        self._config = config
        self._constants = constants
        self._embeds = embeds
        self._masks = [attention_mask_of(batch, embed) for embed in embeds]
        self._noise = {"seed": seed, "distribution": config.distribution, "sample_offset": sample_offset}
        self._grads: Sequence[Tensor] | None = None
        self._deltas: list[Tensor | None] = [None] * len(embeds)
        self._final_deltas: list[Tensor | None] = [None] * len(embeds)
        self._statistics: list[Tensor] = []

    def leaves(self) -> list[Tensor]:
        """Perturbed embeddings of every module, made outside the model, to be differentiated."""
        if self._grads is None:
            perturbed = [self._start(index, embed) for index, embed in enumerate(self._embeds)]
        else:
            climbed = [self._ascend(index, embed, return_delta=True) for index, embed in enumerate(self._embeds)]
            perturbed = [embeds for embeds, _ in climbed]
            self._deltas = [delta for _, delta in climbed]
        return [tensor.requires_grad_() for tensor in perturbed]

    def climb(self, grads: Sequence[Tensor]) -> None:
        """Take the gradients at the present leaves; the next leaves, or the final pass, go along them."""
        self._grads = grads

    def final(self, index: int, output: Tensor, *, telemetry: bool, keep_delta: bool) -> Tensor:
        """A module's live output at the final perturbation; the gradient to the output is the identity.

        ``telemetry`` collects the statistics of :meth:`figures`, ``keep_delta`` what :meth:`halved` needs.
        """
        if self._grads is None:
            if not keep_delta:
                return self._start(index, output)
            perturbed, self._final_deltas[index] = self._start(index, output, return_delta=True)
            return perturbed
        results = self._ascend(index, output, return_delta=keep_delta, return_stats=telemetry)
        if not (telemetry or keep_delta):
            return results
        perturbed, *rest = results
        if keep_delta:
            self._final_deltas[index] = rest.pop(0)
        if telemetry:
            self._statistics.append(rest.pop(0))
        return perturbed

    def halved(self, index: int, output: Tensor) -> Tensor:
        """A module's output at half the final perturbation."""
        delta = self._final_deltas[index]
        return (output.to(delta.dtype) + delta / 2).to(output.dtype)

    def figures(self) -> dict[str, Tensor]:
        """Sums over modules, sequences and positions, for the telemetry; empty where nothing climbed."""
        if not self._statistics:
            return {}
        total = sum(statistics.sum((0, 1)) for statistics in self._statistics)
        elements = sum(
            torch.full_like(total[0], embed.numel()) if mask is None else (mask != 0).sum() * embed.shape[2]
            for embed, mask in zip(self._embeds, self._masks, strict=True)
        )
        return {**dict(zip(STATISTICS, total, strict=True)), "elements": elements}

    def _options(self, index: int) -> dict[str, Any]:
        return {
            "std": self._constants("std", self._embeds[index].device),
            "distribution": self._noise["distribution"],
            "stream": index,
            "sample_offset": self._noise["sample_offset"],
            "mask": self._masks[index],
            "backend": self._config.backend,
        }

    def _start(self, index: int, embeds: Tensor, *, return_delta: bool = False) -> Any:
        return noise_init(embeds, seed=self._noise["seed"], return_delta=return_delta, **self._options(index))

    def _ascend(self, index: int, embeds: Tensor, *, return_delta: bool = False, return_stats: bool = False) -> Any:
        delta = self._deltas[index]
        return projected_ascent(
            embeds,
            self._grads[index],
            delta,
            seed=self._noise["seed"] if delta is None else None,
            step_size=self._constants("step_size", embeds.device),
            epsilon=self._constants("epsilon", embeds.device),
            norm=self._config.norm,
            normalize=self._config.normalize,
            level=self._config.level,
            return_delta=return_delta,
            return_stats=return_stats,
            **self._options(index),
        )


def attention_mask_of(batch: Mapping[str, Any], embeds: Tensor) -> Tensor | None:
    """The batch's attention mask for a (B, S, H) module output: the one of its shape, or None if there is none."""
    masks = [batch[key] for key in ("attention_mask", "decoder_attention_mask") if isinstance(batch.get(key), Tensor)]
    for mask in masks:
        if mask.shape == embeds.shape[:2]:
            return mask != 0 if mask.is_floating_point() else mask
    if masks:
        raise ValueError(
            f"attention_mask: expected shape {tuple(embeds.shape[:2])} as the perturbed module's output, "
            f"got {' and '.join(str(tuple(mask.shape)) for mask in masks)}"
        )
    return None
