"""Which positions of a batch hold tokens, and which of them are followed by a token of the same document.

A row may hold several documents: their position ids start again at 0, and their attention is a block-diagonal
(B, heads, S, S) mask, boolean (True may attend) or added to the scores (so that exp of it is a factor).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def visible_positions(batch: Mapping[str, Any], key: str = "attention_mask") -> Tensor | None:
    """(B, S) positions that are no padding, True where a 2-D mask is not 0 or a position of a 4-D one may see itself.

    Args:
        batch: arguments of a model; a mapping of masks, one a kind of layer, counts by its first.
        key: the mask's name.

    Returns:
        None where the batch has no such mask.

    Raises:
        ValueError: a mask of another shape.
    """
    mask = _mask(batch, key)
    if mask is None:
        return None
    return _as_samples(mask != 0 if mask.dim() == 2 else _attends(mask, 0), batch)


def continued_positions(batch: Mapping[str, Any]) -> Tensor | None:
    """(B, S) positions whose next token belongs to the same document; all visible ones where nothing separates any.

    Documents are told apart by ``position_ids`` (B, S) that start again at 0, and by a 4-D ``attention_mask`` where a
    position may not attend to the one before it. Only with one of the two is the last token of a row left out.

    Returns:
        None where the batch has neither an attention mask nor position ids.

    Example:
        >>> import torch
        >>> continued_positions({"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}).int()
        tensor([[1, 1, 0, 1, 0]], dtype=torch.int32)
    """
    mask, position_ids = _mask(batch, "attention_mask"), batch.get("position_ids")
    visible = visible_positions(batch)
    followed = []
    if isinstance(position_ids, Tensor) and position_ids.dim() == 2:
        followed.append(_as_samples(position_ids[:, 1:] != 0, batch))
    if mask is not None and mask.dim() == 4:
        followed.append(_as_samples(_attends(mask, 1), batch))
    if not followed:
        return visible
    if visible is not None:
        followed.append(visible[:, :-1] & visible[:, 1:])
    return torch.nn.functional.pad(torch.stack(followed).all(0), (0, 1), value=False)


def _mask(batch: Mapping[str, Any], key: str) -> Tensor | None:
    mask = batch.get(key)
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() != 2 and (mask.dim() != 4 or mask.shape[2] != mask.shape[3]):
        raise ValueError(f"{key}: expected shape (B, S) or (B, heads, S, S), got {tuple(mask.shape)}")
    return mask


def _attends(mask: Tensor, distance: int) -> Tensor:
    """(B, S - distance) whether position s + distance may attend to position s, in any head."""
    seen = mask.diagonal(offset=-distance, dim1=2, dim2=3)
    return (seen.float().exp() > 0 if mask.is_floating_point() else seen != 0).any(1)


def _as_samples(positions: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """The same with one row a sample, where one row was given for all."""
    for key in ("input_ids", "inputs_embeds", "labels"):
        if isinstance(batch.get(key), Tensor):
            return positions.expand(batch[key].shape[0], -1)
    return positions
