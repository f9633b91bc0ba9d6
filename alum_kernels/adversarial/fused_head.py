"""Whether a language model is trained without its logits, and why not where it is not."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from alum_kernels.adversarial.config import AdversarialConfig
from alum_kernels.adversarial.gathering_units import GatheringUnits
from alum_kernels.adversarial.heads import Head
from alum_kernels.adversarial.linear_head import LinearHead, find_linear_head
from alum_kernels.adversarial.model_state import has_static_graph, original
from alum_kernels.adversarial.parallelism import GATHERED_IN_FORWARDS
from alum_kernels.adversarial.passes import any_sample, one_sample, refusal
from alum_kernels.ops.linear_arguments import LINEAR_DIVERGENCES

OTHER_LOSS = "its task loss is the caller's, of the logits"


class FusedHead:
    """The linear head of a model, for as long as nothing speaks against it.

    Args:
        model: the model.
        head: what it predicts, None if that is not known.
        config: ``config.fused_head`` True demands the linear head, False does without, None takes it where it can be.
        own_loss: the task's loss is the model's own.

    Attributes:
        linear: the head, or None: the model goes through its logits.

    Raises:
        ValueError: a linear head was demanded and cannot be.
    """

    def __init__(self, model: nn.Module, head: Head | None, config: AdversarialConfig, own_loss: bool) -> None:
        self._model, self._head, self._demanded = original(model), head, config.fused_head
        self._verified = False
        self.linear = self._find(config, own_loss)

    def of_batch(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        leaves_logits: bool,
        *,
        own_loss: bool = True,
        sharded: bool = False,
    ) -> LinearHead | None:
        """The linear head, if this batch can go through it; the first one with a label decides for all.

        Args:
            model: as it is trained.
            batch: arguments of the model, labels included.
            leaves_logits: the task's loss can do without them.
            own_loss: the task's loss is the model's own.
            sharded: ``fully_shard`` was applied to the model.
        """
        if self.linear is None:
            return None
        if sharded and self.linear.units is None:
            self.linear.units = GatheringUnits(model, self.linear.projection)
        if has_static_graph(model):
            self.linear = self._refuse(
                "a static graph of DistributedDataParallel counts on the loss of its own outputs"
            )
        elif not leaves_logits:
            self.linear = self._refuse(OTHER_LOSS)
        elif sharded and not own_loss:
            self.linear = self._refuse(f"its task loss is the caller's, and {GATHERED_IN_FORWARDS}")
        elif not self._verified:
            reason, self._verified = self._verify(batch)
            self.linear = self.linear if reason is None else self._refuse(reason)
        return self.linear

    def _verify(self, batch: Mapping[str, Any]) -> tuple[str | None, bool]:
        """Why the model is not what the head takes it for, None where it is; and whether a label could tell.

        Under ``fully_shard`` ranks without a label make the same passes as the others, and all go by what those find.
        """
        units, sample = self.linear.units, one_sample(self._head, batch)
        if units is None:
            found = None if sample is None else refusal(self._model, self._head, sample, self.linear)
            return found, sample is not None
        found = refusal(self._model, self._head, any_sample(batch) if sample is None else sample, self.linear)
        return units.first_reason(None if sample is None else found, sample is not None)

    def _find(self, config: AdversarialConfig, own_loss: bool) -> LinearHead | None:
        tokens = self._head is not None and self._head.tokens is not None
        if config.fused_head is False or (config.fused_head is None and not tokens):
            return None
        unfused = {config.divergence, config.ascent_divergence} - set(LINEAR_DIVERGENCES)
        if not tokens:
            return self._refuse(f"its head is {'not recognised' if self._head is None else self._head.name}")
        if not own_loss:
            return self._refuse(OTHER_LOSS)
        if config.climbs_linearity:
            return self._refuse("its loss is differentiated twice, which the fused head cannot be")
        if config.proximal > 0:
            return self._refuse("its proximal term compares two sets of weights")
        if config.compares and unfused:
            return self._refuse(f"there is no fused {', '.join(sorted(unfused))}")
        found = find_linear_head(self._model)
        if isinstance(found, LinearHead) and found.split is not None and config.backend is not None:
            found = f"its vocabulary is split over ranks, which backend={config.backend!r} does not serve"
        return self._refuse(found) if isinstance(found, str) else found

    def _refuse(self, reason: str) -> None:
        name = type(self._model).__name__
        if self._demanded:
            raise ValueError(
                f"fused_head: expected a model that can be trained without its logits, got {name}: {reason}"
            )
        warnings.warn(
            f"{name} is trained through its logits: {reason}. AdversarialConfig(fused_head=False) chooses that",
            stacklevel=2,
        )
