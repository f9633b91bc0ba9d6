"""A language model's output projection, taken apart from it, so that its logits need not be formed.

The model runs as it is, except that its projection gives the logits of a few classes only; the hidden states that it
was given go to ``linear_symmetric_kl`` and to a chunked cross-entropy, on the rows that count.

A model is taken for such a one if its output embeddings are one plain ``nn.Linear`` over the vocabulary, and if it
behaves so on one sample: the few logits that it returns are what the projection's formula says, logit scale and soft
cap of the configuration included, and its own loss is the mean cross-entropy of the labels.

The weight may be split over ranks by its classes (``split_projection.py``): each rank then forms a few of its own. Or
``fully_shard`` may keep a part of it on each rank (``gathering_units.py``): it is whole where it is used.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from alum_kernels.adversarial.gathering_units import GatheringUnits, Result
from alum_kernels.adversarial.parallelism import class_as_written, is_fully_sharded
from alum_kernels.adversarial.split_projection import SplitProjection
from alum_kernels.backends.soft_cap import finished_logits
from alum_kernels.ops.checks import is_dtensor
from alum_kernels.ops.linear_cross_entropy import linear_cross_entropy

PROBED_CLASSES = 8
"""Classes whose logits the model still forms, on every rank."""


@dataclass
class Captured:
    """What a model's projection was given in one pass."""

    hidden: list[Tensor] = field(default_factory=list)
    autocast: torch.dtype | None = None


class LinearHead:
    """logits = cap tanh(scale (hidden weight^T + bias) / cap), or without the cap.

    Args:
        projection: the module; its weight (V, H) and bias (V,) are those of the moment, tied or not.
        logit_scale, soft_cap: as in :func:`alum_kernels.linear_symmetric_kl`.
        sharded: ``fully_shard`` was applied to its model, so that a DTensor weight has no meaning of its own.

    Attributes:
        split: how its classes lie on ranks; None where this one has them all.
        units: of ``fully_shard``, which gather it; None where nothing has to.
    """

    def __init__(
        self,
        projection: nn.Linear,
        logit_scale: float = 1.0,
        soft_cap: float | None = None,
        *,
        sharded: bool = False,
    ) -> None:
        self.projection, self.logit_scale, self.soft_cap = projection, logit_scale, soft_cap
        self.split = SplitProjection(projection) if is_dtensor(projection.weight) and not sharded else None
        self.units: GatheringUnits | None = None
        self._captured: Captured | None = None
        # one object for every pass: a compiled model would take another one for another model
        self._narrow_forward = self._narrow

    @contextmanager
    def capturing(self) -> Iterator[Captured]:
        """Within the context the projection keeps what it is given, and gives the first few logits only."""
        self._captured = Captured()
        self.projection.forward = self._narrow_forward
        try:
            yield self._captured
        finally:
            del self.projection.forward  # the class's own is found again
            self._captured = None

    def gathered(self, work: Callable[[], Result], hidden: Sequence[Tensor] = ()) -> Result:
        """What ``work`` returns, which uses weight and bias: run where they are whole.

        Args:
            work: gives tensors, or tuples and lists of some.
            hidden: what the projection was given in a pass that is differentiated.
        """
        return work() if self.units is None else self.units.run(work, hidden)

    def autocast(self, captured: Captured) -> AbstractContextManager[None]:
        """The autocast under which the projection ran."""
        if captured.autocast is None:
            return nullcontext()
        return torch.autocast(self.projection.weight.device.type, dtype=captured.autocast)

    def mismatch(self, captured: Captured, logits: Any) -> str | None:
        """Why the logits that a model returned are not those of this formula, or None if they are. The host waits."""
        if self.split is None:
            return self.gathered(lambda: self._mismatch(captured, logits))
        return self.split.first_reason(self._mismatch(captured, self.split.own_logits(logits, PROBED_CLASSES)))

    def _mismatch(self, captured: Captured, logits: Any) -> str | None:
        if len(captured.hidden) != 1:
            return f"its output projection ran {len(captured.hidden)} times in a forward pass"
        with torch.no_grad(), self.autocast(captured):
            expected = finished_logits(self._few_products(captured.hidden[0]), self.logit_scale, self.soft_cap)
        if not isinstance(logits, Tensor) or logits.shape != expected.shape:
            return "its predictions do not have the shape of its output projection's"
        if not _close(logits, expected, expected.dtype):
            return "its logits are not its output projection's, scaled and capped as its configuration says"
        return None

    def cross_entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Sum over rows (N, H) of the cross-entropy of their labels (N,); where the weight is gathered."""
        return linear_cross_entropy(
            hidden,
            self.projection.weight,
            labels,
            self.projection.bias,
            logit_scale=self.logit_scale,
            soft_cap=self.soft_cap,
        )

    def _narrow(self, hidden: Tensor) -> Tensor:
        device, captured = hidden.device.type, self._captured
        parallel = is_dtensor(hidden)
        hidden = hidden.to_local() if parallel else hidden  # replicated, as the hook before this makes it
        if self.units is not None and hidden._is_view():
            hidden = hidden.clone()  # a hook on a view is lost when its base changes in place
        captured.hidden.append(hidden)
        captured.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        few = self._few_products(hidden)
        return self.split.as_output(few) if parallel else few

    def _few_products(self, hidden: Tensor) -> Tensor:
        weight, bias = self.projection.weight, self.projection.bias
        if self.split is not None:
            weight, bias = weight.to_local(), None if bias is None else bias.to_local()
        return functional.linear(hidden, weight[:PROBED_CLASSES], None if bias is None else bias[:PROBED_CLASSES])


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Equal but for the rounding of ``dtype``."""
    tolerance = 64 * torch.finfo(dtype).eps
    found, expected = found.detach().double(), expected.detach().double()
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()), equal_nan=True)


def losses_agree(found: Tensor, expected: Tensor, captured: Captured) -> bool:
    """Whether two losses are the same but for the rounding of the hidden states (models use fp32 at the most)."""
    dtype = captured.hidden[0].dtype if captured.autocast is None else captured.autocast
    return _close(found, expected, torch.float32 if dtype == torch.float64 else dtype)


def find_linear_head(model: nn.Module) -> LinearHead | str:
    """The output projection of a language model, or why it cannot be taken apart from it."""
    getter = getattr(model, "get_output_embeddings", None)
    projection = getter() if callable(getter) else None
    if projection is None:
        return "it has no output embeddings"
    kind = class_as_written(projection)
    if kind is not nn.Linear or "forward" in vars(projection):
        replaced = " whose forward is replaced" if "forward" in vars(projection) else ""
        return f"its output embeddings are a {kind.__module__}.{kind.__name__}{replaced}"
    if not projection.weight.is_floating_point():
        return f"its output embeddings hold {projection.weight.dtype} weights"
    if getattr(model, "final_logits_bias", None) is not None:
        return "it adds final_logits_bias to its output projection's logits"
    config = getattr(model, "config", None)
    text = config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config
    vocabulary = getattr(text, "vocab_size", projection.out_features)
    if projection.out_features < vocabulary or projection.out_features < PROBED_CLASSES:
        return f"its output embeddings have {projection.out_features} rows, not a vocabulary's"
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    cap = getattr(text, "final_logit_softcapping", None)
    try:
        head = LinearHead(projection, scale, None if cap is None else float(cap), sharded=is_fully_sharded(model))
    except ValueError:
        return f"its output embeddings hold a DTensor with placements {projection.weight.placements}, not Shard(dim=0)"
    obstacle = None if head.split is None else head.split.obstacle(PROBED_CLASSES)
    return head if obstacle is None else obstacle
