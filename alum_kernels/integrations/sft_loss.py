"""The task's loss under TRL's ``SFTTrainer``, whose forward pass forms no logits.

Its models get a forward that multiplies the last hidden state by the output embeddings' weight in chunks, without a
call of that module, and returns each token's log-probability, entropy and whether it was the likeliest. So the loss
(``nll`` or ``dft``, the experts' balance included) and the logged token accuracy, entropy and token counts are its own;
the divergence is computed from the same hidden state, without logits too. Where several passes of a step compute the
task's loss, its tokens count once, and accuracy and entropy are means over these passes.

Source: trl 1.16, ``compute_loss`` in ``trl/trainer/sft_trainer.py``, ``add_fused_lm_head`` in ``trl/trainer/utils.py``.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from alum_kernels.adversarial.model_state import original
from alum_kernels.adversarial.objectives import AdversarialObjective
from alum_kernels.integrations.trainer_losses import ComputeLoss, ParentLoss, one_micro_batch


class SupervisedFineTuningLoss(ParentLoss):
    """Of ``SFTTrainer.compute_loss``."""

    standard = False
    without_logits = True

    def __init__(self, trainer: Trainer, compute_loss: ComputeLoss) -> None:
        super().__init__(trainer, compute_loss)
        if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
            raise ValueError(
                "args: expected SFTTrainer's own loss, got compute_loss_func or label_smoothing_factor, with which it "
                "runs the model twice a step; override compute_loss in a subclass of transformers.Trainer instead"
            )
        self._shown_to: nn.Module | None = None
        self._objective: AdversarialObjective | None = None
        self._showing = False

    def check(self, objective: AdversarialObjective) -> None:
        """Installs what shows the hidden states to the objective's linear head.

        Raises:
            ValueError: the objective needs logits.
        """
        self._objective = objective
        self._check_linear_head()
        model = original(objective.model)
        # an adapter's base model is the one whose forward TRL replaced
        written = model.get_base_model() if hasattr(model, "get_base_model") else model
        if self._shown_to is not written.base_model:
            self._shown_to = written.base_model
            self._shown_to.register_forward_hook(self._show)

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        self._tokens_before = self._trainer._total_train_tokens
        return {**batch, "use_cache": False}  # as SFTTrainer has it for its own pass

    def of(self, module: nn.Module, part: Mapping[str, Any], items: Tensor | None) -> tuple[Tensor, Any]:
        """As of the parent, without outputs: they would cost another forward pass."""
        self._check_linear_head()
        count = None if items is None else items.clamp(min=1)
        self._trainer._total_train_tokens = self._tokens_before
        self._showing = True
        try:
            with one_micro_batch(self._trainer):
                return self._compute_loss(module, dict(part), num_items_in_batch=count), None
        finally:
            self._showing = False

    def _show(self, backbone: nn.Module, args: Any, output: Any) -> None:
        if self._showing and self._objective.linear_head is not None:
            self._objective.linear_head.projection(output.last_hidden_state)

    def _check_linear_head(self) -> None:
        if self._objective.config.compares and self._objective.linear_head is None:
            raise ValueError(
                "adversarial: expected a method that compares predictions without logits, since SFTTrainer forms none, "
                f"got {self._objective.config.method}, for which no linear head is used (a warning says why, unless "
                "fused_head=False does); AdversarialTrainer on the same samples forms logits"
            )
