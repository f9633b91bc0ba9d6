"""A language model's output projection, taken apart from it, so that its logits are never formed.

The model runs as it is, except that its projection gives the logits of a few classes only; the hidden states that it
was given go to ``linear_symmetric_kl`` and to a chunked cross-entropy, on the rows that count.

A model is recognised by what it does, not by its name: its output embeddings are one plain ``nn.Linear`` over the
vocabulary, and in the first pass the few logits that the model returns must be what the projection's formula says,
logit scale and soft cap of the configuration included.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from alum_kernels.backends.linear_chunks import chunk_budget

PROBED_CLASSES = 8
"""Classes whose logits the model still forms."""


@dataclass
class Captured:
    """What a model's projection was given in one pass."""

    hidden: list[Tensor] = field(default_factory=list)
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class LinearHead:
    """logits = cap tanh(scale (hidden weight^T + bias) / cap), or without the cap.

    Attributes:
        projection: the module; its weight (V, H) and bias (V,) are those of the moment, tied or not.
        logit_scale, soft_cap: as in :func:`alum_kernels.linear_symmetric_kl`.
    """

    projection: nn.Linear
    logit_scale: float = 1.0
    soft_cap: float | None = None

    @contextmanager
    def capturing(self) -> Iterator[Captured]:
        """Within the context the projection keeps what it is given, and gives the first few logits only."""
        captured = Captured()
        projection = self.projection

        def narrow(hidden: Tensor) -> Tensor:
            captured.hidden.append(hidden)
            device = hidden.device.type
            captured.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            bias = None if projection.bias is None else projection.bias[:PROBED_CLASSES]
            return functional.linear(hidden, projection.weight[:PROBED_CLASSES], bias)

        projection.forward = narrow
        try:
            yield captured
        finally:
            del projection.forward  # the class's own is found again

    def finish(self, products: Tensor) -> Tensor:
        """Logits of products to which the bias has been added."""
        scaled = products if self.logit_scale == 1.0 else products * self.logit_scale
        return scaled if self.soft_cap is None else self.soft_cap * torch.tanh(scaled / self.soft_cap)

    def mismatch(self, captured: Captured, logits: Any) -> str | None:
        """Why the logits that a model returned are not those of this formula, or None if they are. The host waits."""
        calls, name = len(captured.hidden), type(self.projection).__name__
        if calls != 1:
            return f"its output projection ({name}) ran {calls} times in a forward pass"
        with torch.no_grad(), self.autocast(captured):
            bias = None if self.projection.bias is None else self.projection.bias[:PROBED_CLASSES]
            weight = self.projection.weight[:PROBED_CLASSES]
            expected = self.finish(functional.linear(captured.hidden[0], weight, bias))
        if not isinstance(logits, Tensor) or logits.shape != expected.shape:
            return "its predictions do not have the shape of its output projection's"
        tolerance = 16 * torch.finfo(expected.dtype).eps
        found, expected = logits.detach().float(), expected.float()
        if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
            return "its logits are not its output projection's, scaled and capped as its configuration says"
        return None

    def autocast(self, captured: Captured) -> AbstractContextManager[None]:
        """The autocast under which the projection ran."""
        if captured.autocast is None:
            return nullcontext()
        return torch.autocast(self.projection.weight.device.type, dtype=captured.autocast)

    def cross_entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Sum of the cross-entropies of rows, fp32, without more than a chunk of their logits where they are many.

        Args:
            hidden: (N, H).
            labels: (N,) int64.
        """
        weight, bias = self.projection.weight, self.projection.bias
        plain = self.logit_scale == 1.0 and self.soft_cap is None
        few = hidden.shape[0] * weight.shape[0] * 4 <= chunk_budget(None, hidden.device)
        fused = getattr(functional, "linear_cross_entropy", None)
        if plain and not few and fused is not None:
            options = nn.LinearCrossEntropyOptions(allow_retain_graph=True)
            return fused(hidden, weight, labels, linear_bias=bias, reduction="sum", options=options)
        if few:
            return self._cross_entropy_of_chunk(hidden, labels)
        rows = max(chunk_budget(None, hidden.device) // (weight.shape[0] * 4), 1)
        parts = [
            checkpoint(self._cross_entropy_of_chunk, *pair, use_reentrant=False)
            for pair in zip(hidden.split(rows), labels.split(rows), strict=True)
        ]
        return torch.stack(parts).sum()

    def _cross_entropy_of_chunk(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.finish(functional.linear(hidden, self.projection.weight, self.projection.bias))
        return functional.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum"
        )


def find_linear_head(model: nn.Module) -> LinearHead | str:
    """The output projection of a language model, or why it cannot be taken apart from it."""
    getter = getattr(model, "get_output_embeddings", None)
    projection = getter() if callable(getter) else None
    if projection is None:
        return "it has no output embeddings"
    if type(projection) is not nn.Linear or "forward" in vars(projection):
        replaced = " whose forward is replaced" if "forward" in vars(projection) else ""
        return f"its output embeddings are a {type(projection).__module__}.{type(projection).__name__}{replaced}"
    if not projection.weight.is_floating_point():
        return f"its output embeddings hold {projection.weight.dtype} weights"
    config = getattr(model, "config", None)
    text = config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config
    vocabulary = getattr(text, "vocab_size", projection.out_features)
    if projection.out_features < vocabulary or projection.out_features < PROBED_CLASSES:
        return f"its output embeddings have {projection.out_features} rows, not a vocabulary's"
    if getattr(text, "output_router_logits", False):
        return "its loss has terms of its router"
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    cap = getattr(text, "final_logit_softcapping", None)
    return LinearHead(projection, scale, None if cap is None else float(cap))
