"""The adversarial objective in a loop with Hugging Face Accelerate: ``prepare``, ``accumulate`` and ``backward``."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alum_kernels.adversarial.config import AdversarialConfig
from alum_kernels.adversarial.noise_place import NoisePlace
from alum_kernels.adversarial.objectives import AdversarialObjective
from alum_kernels.adversarial.output import AdversarialOutput
from alum_kernels.adversarial.run import Backward
from alum_kernels.adversarial.samples import sample_count
from alum_kernels.ops.checks import check_count

try:
    from accelerate import Accelerator
except ImportError as error:
    raise ImportError(
        "alum_kernels.integrations.accelerate: expected accelerate to be installed; "
        "pip install 'alum-kernels[transformers]'"
    ) from error


class AcceleratedObjective(AdversarialObjective):
    """An objective that knows where a batch lies in the optimizer step that ``accelerator.accumulate`` makes of some.

    The batches of an optimizer step, over micro-batches and processes, share a seed and have places of their own
    (:class:`alum_kernels.NoisePlace`), so that splitting a batch changes nothing. A batch within ``accumulate`` whose
    gradients are summed (``accelerator.sync_gradients``) is its step's last. Schedules count optimizer steps.

    :meth:`backward` is ``accelerator.backward`` of all passes: it divides by the accumulated steps and scales under
    fp16, so gradients are clipped by ``accelerator.clip_grad_norm_`` and the optimizer steps as in any such loop. All
    micro-batches weigh the same, as Accelerate has it; where a loss is a mean over different numbers of labels,
    ``scale`` says what one weighs: its number of labels over the mean number in a micro-batch of the step.

    Args:
        model: as ``accelerator.prepare`` gave it.
        config: the method and its constants.
        accelerator: of one process, or of several under ``DistributedDataParallel``.
        total_steps: optimizer steps of the whole training, where a schedule speaks of shares of it.
        options: ``head`` and ``loss`` of :class:`AdversarialObjective`.

    Raises:
        TypeError: ``accelerator`` is none.
        ValueError: it distributes in another way; or the method updates the model at each replay of a batch, and
            batches are accumulated.

    Example:
        >>> import torch, transformers
        >>> from accelerate import Accelerator
        >>> from alum_kernels import AdversarialConfig
        >>> from alum_kernels.integrations.accelerate import AcceleratedObjective
        >>> shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=40, **shape))
        >>> accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> adversarial = AcceleratedObjective(model, AdversarialConfig.smart(), accelerator=accelerator)
        >>> for _ in range(2):
        ...     batch = {"input_ids": torch.randint(40, (4, 6)), "labels": torch.randint(2, (4,))}
        ...     with accelerator.accumulate(model):
        ...         figures = adversarial.backward(batch)
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> sorted(figures)
        ['divergence', 'loss', 'task_loss']
    """

    def __init__(
        self,
        model: nn.Module,
        config: AdversarialConfig,
        *,
        accelerator: Accelerator,
        total_steps: int | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(accelerator, Accelerator):
            raise TypeError(f"accelerator: expected an accelerate.Accelerator, got {type(accelerator).__name__}")
        if total_steps is not None:
            check_count("total_steps", total_steps)
        kind = other_distribution(accelerator)
        if kind is not None:
            raise ValueError(f"accelerator: expected a single process or DistributedDataParallel, got {kind}")
        accumulated = accelerator.gradient_accumulation_steps
        if config.backward == "replay" and accumulated > 1:
            raise ValueError(
                f"accelerator: expected gradient_accumulation_steps 1 for {config.method}, which updates the model at "
                f"each replay of a batch, got {accumulated}"
            )
        super().__init__(model, config, **options)
        self.optimizer_steps = 0
        """Optimizer steps whose last batch was seen."""
        self._accelerator, self._total = accelerator, total_steps
        self._place = NoisePlace(self, accelerator.process_index, accelerator.num_processes)

    def forward(self, batch: Mapping[str, Any], *, seed: Tensor | None = None, **options: Any) -> AdversarialOutput:
        """The parent's, with the seed of the present optimizer step and the batch's place in it, if none is given."""
        self.set_progress(self.optimizer_steps, self._total)
        if seed is None:
            seed, options["sample_offset"] = self._place.next(sample_count(batch))
        output = super().forward(batch, seed=seed, **options)
        if self._accelerator.sync_gradients:
            self.optimizer_steps += 1
            self._place.begin()
        return output

    def backward(
        self, batch: Mapping[str, Any], scale: float | Tensor = 1.0, backward: Backward | None = None, **options: Any
    ) -> dict[str, Tensor]:
        """The parent's, by ``accelerator.backward``; ``batch``, ``scale`` and the options are its."""
        return super().backward(batch, scale, backward or self._accelerator.backward, **options)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """The parent's, of the optimizer that ``accelerator.prepare`` wrapped."""
        super().follow(getattr(optimizer, "optimizer", optimizer))

    def capture(self, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError: Accelerate's own steps are not captured."""
        raise ValueError(
            "capture: expected an AdversarialObjective in a loop without Accelerate, got an accelerated one"
        )

    def state_dict(self) -> dict[str, Any]:
        """For ``accelerator.register_for_checkpointing``, between two optimizer steps."""
        return {**super().state_dict(), "optimizer_steps": self.optimizer_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint: ``state`` is what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self.optimizer_steps = state["optimizer_steps"]
        self._place.begin()


def other_distribution(accelerator: Accelerator) -> str | None:
    """How an accelerator distributes, where that is neither one process nor ``DistributedDataParallel``."""
    kind = str(accelerator.distributed_type.value)
    if kind == "NO" or kind.startswith("MULTI_"):
        return None
    never = ", which was never tested with Accelerate; a loop of your own can use fully_shard"
    return kind + never if kind == "FSDP" else kind
