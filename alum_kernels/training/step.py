"""One optimizer step on some batches, standard or adversarial.

    loss = sum over the batches of  (the batch's loss) * items of the batch / items of the step

An item is a sample, or a labelled token where the model predicts at each position. So batches that are accumulated add
up to the one batch that they split, and so do their perturbations: they share a seed, and a sample's noise is a
function of its place in the step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from alum_kernels.adversarial.finite import FiniteGuard
from alum_kernels.adversarial.labels import IGNORED_LABEL
from alum_kernels.adversarial.objectives import AdversarialObjective
from alum_kernels.training.batches import Batch
from alum_kernels.training.precision import Precision


class StepFigures(NamedTuple):
    """What a step gave: detached scalars on the device, and whether the parameters changed.

    Attributes:
        loss: what was minimised.
        task_loss: the task's share of it.
        updated: False where a gradient was not finite, or no batch had a label.
    """

    loss: Tensor
    task_loss: Tensor
    updated: bool


class Stepper:
    """Makes optimizer steps.

    Args:
        model: the model, on its device.
        objective: the adversary; None is standard training.
        optimizer: of its parameters.
        precision: of the passes.
        clip: largest norm of the gradient; 0 does not clip.

    Attributes:
        guard: leaves out steps that are not finite, and counts them.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: AdversarialObjective | None,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        clip: float,
    ) -> None:
        self._model, self._objective, self._optimizer, self._precision = model, objective, optimizer, precision
        self._clip, self.guard = clip, FiniteGuard()
        self._device = next(model.parameters()).device

    def step(self, batches: Sequence[Batch]) -> StepFigures:
        """Forward and backward passes of every batch, and the update of the parameters."""
        items = [_items(batch) for batch in batches]
        total = sum(items)
        loss = task_loss = torch.zeros((), device=self._device)
        if total == 0:
            return StepFigures(loss, task_loss, updated=False)
        seed = None if self._objective is None else self._objective.draw_seed(self._device)
        place = 0
        for batch, count in zip(batches, items, strict=True):
            if count:  # the mean over no labelled position is 0 / 0
                share = count / total
                placed = {name: tensor.to(self._device) for name, tensor in batch.items()}
                whole, task = self._passes(placed, share, seed, place)
                loss, task_loss = loss + whole.float() * share, task_loss + task.float() * share
            place += len(batch["labels"])
        self.guard.watch({"loss": loss})
        return StepFigures(loss, task_loss, updated=self._update())

    def _passes(self, batch: Batch, share: float, seed: Tensor | None, place: int) -> tuple[Tensor, Tensor]:
        """All passes of one batch; its loss and the task's share of it."""
        if self._objective is None:
            with self._precision.autocast():
                loss = self._model(**batch).loss
            self._precision.backward(loss * share)
            return loss.detach(), loss.detach()
        replays = self._objective.config.backward == "replay"
        with self._precision.autocast():
            output = self._objective.forward(
                batch,
                seed=seed,
                sample_offset=place,
                backward=lambda earlier: self._precision.backward(earlier * share),
                update=self._update if replays else None,
            )
        self._precision.backward(output.loss * share)
        return output.loss.detach(), output.task_loss

    def _update(self) -> bool:
        """Change the parameters by their gradients, which are gone afterwards; False where they were not finite."""
        self._precision.unscale(self._optimizer)
        allowed = self.guard.allows(self._model, scaler=self._precision.scaler)  # else there are no gradients left
        if allowed and self._clip:
            nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        if allowed:
            self._precision.step(self._optimizer)
        self._precision.end_of_update()
        self._optimizer.zero_grad(set_to_none=True)
        return allowed


def _items(batch: Batch) -> int:
    """Of a batch on the host: labels that count, a sample's or a token's."""
    labels = batch["labels"]
    return labels.numel() if labels.dim() == 1 else int((labels != IGNORED_LABEL).sum())
