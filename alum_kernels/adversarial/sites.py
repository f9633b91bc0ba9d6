"""Where a model is perturbed: its embeddings, the layer norm of its embeddings, or any module by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alum_kernels.adversarial.labels import IGNORED_LABEL
from alum_kernels.adversarial.positions import visible_positions

EMBEDDING_NORMS = ("embeddings.LayerNorm", "embeddings.norm", "layernorm_embedding")
"""How the layer norm of the embeddings is called: BERT and its kin, ModernBERT, BART."""


@dataclass(frozen=True)
class Site:
    """One perturbed tensor: the output (or the first input) of a module.

    Attributes:
        name: of the module.
        module: the module.
        on_input: the module's input is perturbed.
        decoder: it lies in the decoder of an encoder-decoder, whose tokens are not the encoder's.
    """

    name: str
    module: nn.Module
    on_input: bool = False
    decoder: bool = False

    def valid_positions(
        self, batch: Mapping[str, Any], embeds: Tensor, excluded_tokens: Tensor | None = None
    ) -> Tensor | None:
        """(B, S) positions that may be perturbed, None for all: those of no padding and of no excluded token.

        Args:
            batch: the model's arguments, labels included.
            embeds: (B, S, H) tensor at the site.
            excluded_tokens: ids of tokens that stay as they are, on the batch's device.

        Raises:
            ValueError: an attention mask of another shape, or no token ids to exclude by.
        """
        mask = self._decoder_mask(batch, embeds) if self.decoder else self._encoder_mask(batch, embeds)
        mask = mask != 0 if mask is not None and mask.is_floating_point() else mask
        if excluded_tokens is None:
            return mask
        ids = batch.get("decoder_input_ids" if self.decoder else "input_ids")
        ids = None if not isinstance(ids, Tensor) else _as_rows(ids)
        if ids is None or ids.shape != embeds.shape[:2]:
            came = "none" if ids is None else tuple(ids.shape)
            raise ValueError(
                f"excluded_tokens: expected token ids {tuple(embeds.shape[:2])} for {self.name}, got {came}"
            )
        kept = ~torch.isin(ids, excluded_tokens.to(ids.dtype))
        return kept if mask is None else kept & (mask != 0)

    def _encoder_mask(self, batch: Mapping[str, Any], embeds: Tensor) -> Tensor | None:
        mask = batch.get("attention_mask")
        if isinstance(mask, Mapping) or (isinstance(mask, Tensor) and mask.dim() == 4):
            mask = visible_positions(batch)
        if not isinstance(mask, Tensor):
            return None
        return _of_shape("attention_mask", _as_rows(mask), embeds)

    def _decoder_mask(self, batch: Mapping[str, Any], embeds: Tensor) -> Tensor | None:
        mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
        if isinstance(mask, Tensor):
            return _of_shape("decoder_attention_mask", mask, embeds)
        if isinstance(labels, Tensor) and labels.shape == embeds.shape[:2]:
            return labels != IGNORED_LABEL  # position t reads the label of t - 1 and predicts that of t
        own = "decoder_input_ids" in batch or "decoder_inputs_embeds" in batch
        return None if own else self._encoder_mask(batch, embeds)  # a decoder that reads the encoder's tokens


def _as_rows(tensor: Tensor) -> Tensor:
    """(B, S); of multiple choice, (B, C, S), each choice is a row."""
    return tensor.flatten(0, 1) if tensor.dim() == 3 else tensor


def _of_shape(name: str, mask: Tensor, embeds: Tensor) -> Tensor:
    if mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"{name}: expected shape {tuple(embeds.shape[:2])} as the perturbed tensor, got {tuple(mask.shape)}"
        )
    return mask


def choices_of(batch: Mapping[str, Any]) -> int:
    """Rows of the embeddings that make one sample: the choices of (B, C, S) token ids, else 1."""
    ids = batch.get("input_ids")
    return ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 3 else 1


def perturbed_sites(
    model: nn.Module, names: Sequence[str] = (), *, site: str = "embeddings", side: str = "encoder"
) -> list[Site]:
    """The tensors to perturb.

    Args:
        model: the model, unwrapped.
        names: of modules whose outputs they are, as in ``model.named_modules()``; empty goes by ``site`` and ``side``.
        site: ``"embeddings"`` (the output of the input embeddings), ``"embedding_norm"`` (the output of their layer
            norm) or ``"embedding_norm_input"``.
        side: of an encoder-decoder, ``"encoder"``, ``"decoder"`` or ``"both"``. The embeddings are then the
            ``embed_tokens`` of each side: on T5 and BART ``get_input_embeddings()`` is a module that is never called.

    Raises:
        ValueError: a name that does not exist, a model without what was asked for, or a side that it does not have.
    """
    everything = dict(model.named_modules(remove_duplicate=False))
    two_sided = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    within_decoder = set(model.get_decoder().modules()) if two_sided else set()
    if names:
        for name in names:
            if not name or name not in everything:  # the model itself has no name
                raise ValueError(f"modules: {type(model).__name__} has no module named {name!r}")
        return [Site(name, everything[name], decoder=everything[name] in within_decoder) for name in names]
    if side != "encoder" and not two_sided:
        raise ValueError(
            f"side: expected 'encoder' for {type(model).__name__}, which is no encoder-decoder, got {side!r}"
        )
    sides = {"encoder": (False,), "decoder": (True,), "both": (False, True)}[side]
    return [_site_of(model, everything, two_sided, decoder, site) for decoder in sides]


def _site_of(model: nn.Module, everything: Mapping[str, nn.Module], two_sided: bool, decoder: bool, site: str) -> Site:
    part = (model.get_decoder() if decoder else model.get_encoder()) if two_sided else model
    own_encoder = None if two_sided or not callable(getattr(model, "get_encoder", None)) else model.get_encoder()
    found = None
    if site != "embeddings":
        inside = dict(part.named_modules())
        found = next((module for name, module in inside.items() if name.endswith(EMBEDDING_NORMS)), None)
        wanted = "layer norm of its embeddings"
    else:
        wanted = "input embeddings"
        if two_sided:
            found = getattr(part, "embed_tokens", None)
        elif isinstance(getattr(own_encoder, "embed_tokens", None), nn.Module):
            found = own_encoder.embed_tokens  # an encoder-decoder's encoder with a head on it
        elif callable(getattr(model, "get_input_embeddings", None)):
            found = model.get_input_embeddings()
    if found is None:
        raise ValueError(
            f"model: {type(model).__name__} has no {wanted} to perturb; "
            "name the modules in AdversarialConfig(modules=(...))"
        )
    named = [name for name, module in everything.items() if module is found]
    if two_sided:  # a shared module goes by the name that it has on this side
        prefix = next((name for name, module in everything.items() if module is part), "")
        named = [name for name in named if name.startswith(f"{prefix}.")] or named
    name = named[-1] if named else wanted
    return Site(name, found, on_input=site == "embedding_norm_input", decoder=decoder)
