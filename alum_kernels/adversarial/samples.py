"""Some samples of a batch, as a batch of their own."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def sample_count(batch: Mapping[str, Any]) -> int:
    """How many samples a batch has.

    Raises:
        ValueError: it has no tensor with a dimension of samples.
    """
    named = [batch.get(key) for key in ("input_ids", "inputs_embeds")]
    for value in (*named, *batch.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    raise ValueError(f"batch: expected a tensor with a sample a row, got {', '.join(batch) or 'an empty batch'}")


def select_samples(batch: Mapping[str, Any], index: Tensor, count: int) -> dict[str, Any]:
    """The samples at ``index`` (m,) of a batch of ``count``; whatever has no row for each sample stays as it is."""

    def selected(value: Any) -> Any:
        if isinstance(value, Mapping):  # masks, one a kind of layer
            return {key: selected(part) for key, part in value.items()}
        of_samples = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count
        return value.index_select(0, index) if of_samples else value

    def of_key(key: str, value: Any) -> Any:
        if key == "position_ids" and isinstance(value, Tensor) and value.dim() == 3:  # (axes, B, S)
            return value.index_select(1, index) if value.shape[1] == count else value
        return selected(value)

    return {key: of_key(key, value) for key, value in batch.items()}
