"""What a training step gives back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alum_kernels.adversarial.step import StepResult


@dataclass(frozen=True)
class AdversarialOutput:
    """What a step's passes gave.

    Attributes:
        loss: to be differentiated. Its value is the step's loss; where every pass trains, its gradient is that of the
            last one's share (of a replay, value and gradient are the last one's); with ``memory="low"`` its gradient is
            that of the second clean pass.
        task_loss: the task's own, detached, at the clean point (where there is no clean pass, the mean of the others).
        divergence: mean over the compared rows, detached; 0 where nothing is compared.
        outputs: what the model returned in the clean pass, or in the last one where there is no clean pass.
        adversarial_loss: the task's loss at the perturbed point, detached; None if the method has no such term.
        proximal: divergence of the clean prediction from the teacher's, detached; None without a teacher.
        linearity: mean departure of the samples' losses from linear, detached; None of other methods than ``llr``.
    """

    loss: Tensor
    task_loss: Tensor
    divergence: Tensor
    outputs: Any
    adversarial_loss: Tensor | None = None
    proximal: Tensor | None = None
    linearity: Tensor | None = None

    @classmethod
    def of(cls, result: StepResult) -> "AdversarialOutput":
        """What a step gave (``result``), all but the loss detached."""
        parts = result._asdict()
        loss, outputs = parts.pop("loss"), parts.pop("outputs")
        parts = {name: None if part is None else part.detach() for name, part in parts.items()}
        if parts["divergence"] is None:
            parts["divergence"] = torch.zeros_like(parts["task_loss"])
        return cls(loss=loss, outputs=outputs, **parts)

    def figures(self) -> dict[str, Tensor]:
        """Detached ``loss``, ``task_loss`` and ``divergence``."""
        return {"loss": self.loss.detach(), "task_loss": self.task_loss, "divergence": self.divergence}

    @property
    def logits(self) -> Tensor:
        """Logits of the pass that ``outputs`` is of.

        Raises:
            ValueError: none were formed.
        """
        if isinstance(self.outputs, Tensor):
            return self.outputs
        found = self.outputs["logits"] if isinstance(self.outputs, Mapping) else self.outputs.logits
        if found is None:
            raise ValueError(
                "logits: none are formed where a linear head is fused; AdversarialConfig(fused_head=False) forms them"
            )
        return found
