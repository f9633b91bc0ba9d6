"""The Hugging Face ``Trainer`` with one more argument, ``adversarial``.

A micro-batch's loss is the mean over its items, of the task and of the divergence alike. Where the Trainer counts the
items of a whole optimizer step, the loss is

    (task mean + alpha * divergence mean) * items of the micro-batch / items of the step  [* processes]

so that accumulated micro-batches add up to the one batch that they split, also for heads that ignore the Trainer's
count. The last factor is there when the count runs over all processes, whose gradients are then averaged.

Methods that train on every pass of their ascent differentiate all but the last in ``compute_loss``, with the factor
that the Trainer puts on the loss it is given.
"""

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alum_kernels.adversarial.config import AdversarialConfig
from alum_kernels.adversarial.labels import IGNORED_LABEL
from alum_kernels.adversarial.objectives import AdversarialObjective
from alum_kernels.adversarial.parallelism import is_fully_sharded

try:
    from accelerate.utils import find_batch_size
    from transformers import Trainer
    from transformers.trainer_callback import TrainerState
except ImportError as error:
    raise ImportError(
        "alum_kernels.integrations.transformers: expected transformers and accelerate to be installed; "
        "pip install 'alum-kernels[transformers]'"
    ) from error

SAMPLE_KEY = "sample_index"
"""Column of a dataset that identifies its samples, for perturbations that are kept (``delta_lifetime``)."""

STATE_NAME = "adversarial_state.pt"
"""File of a checkpoint folder that holds the state of the noise."""


class AdversarialTrainer(Trainer):
    """``transformers.Trainer`` whose training loss is the task's plus ``alpha`` times an adversarial divergence.

    Evaluation and prediction are the parent's. Wherever the parent logs ``loss`` (which then includes the adversarial
    term), the figures of :class:`alum_kernels.adversarial.telemetry.Telemetry` stand beside it as ``adv_divergence``,
    ``adv_ascent_gain`` and so on; with several processes they are those of each process's own share. Every optimizer
    step draws one seed, and each sample's noise is a function of that seed and its place in the step's batch: neither
    gradient accumulation nor the number of processes changes it. Checkpoints carry the state of the noise.

    A language model with a linear head is trained without its logits (:class:`AdversarialObjective`): in training its
    outputs then have none, and its loss is computed beside the model. A loss outside the model (``compute_loss_func``,
    label smoothing) keeps the logits.

    Schedules go by the Trainer's steps, a teacher follows its optimizer, and methods that replay a batch make an
    optimizer step (with gradient clipping) after each replay; the learning rate schedule counts batches.

    Perturbations that serve several visits of a sample (``delta_lifetime``) need a dataset with a column
    ``sample_index``, an int that no other sample has; it is read back from the device, once a batch. Each process keeps
    its own, and a checkpoint has none.

    Runs in one process or under ``DistributedDataParallel``.

    Args:
        model, args: as of the parent, and so are all other arguments.
        adversarial: the method and its constants.

    Raises:
        TypeError: ``adversarial`` is no :class:`AdversarialConfig`.
        ValueError: the model has no head or no input embeddings that :class:`AdversarialObjective` recognises (override
            :meth:`create_objective`), or the arguments ask for a way to distribute that is not supported.

    Example:
        >>> import tempfile, torch, transformers
        >>> from alum_kernels import AdversarialConfig
        >>> from alum_kernels.integrations.transformers import AdversarialTrainer
        >>> config = transformers.BertConfig(
        ...     vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        ... )
        >>> samples = [{"input_ids": torch.arange(5, 9), "labels": label} for label in (0, 1, 1, 0)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = AdversarialTrainer(
        ...         model=transformers.BertForSequenceClassification(config),
        ...         args=transformers.TrainingArguments(folder, max_steps=1, save_strategy="no", report_to="none"),
        ...         train_dataset=samples,
        ...         adversarial=AdversarialConfig.smart(),
        ...     )
        ...     trainer.train().global_step  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        1
    """

    objective: AdversarialObjective | None = None

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *rest: Any,
        adversarial: AdversarialConfig,
        **kwargs: Any,
    ) -> None:
        if not isinstance(adversarial, AdversarialConfig):
            raise TypeError(f"adversarial: expected an AdversarialConfig, got {type(adversarial).__name__}")
        if isinstance(model, nn.DataParallel):
            raise ValueError("model: expected a module or DistributedDataParallel, got DataParallel")
        super().__init__(model, args, *rest, **kwargs)
        self.adversarial = adversarial
        self._check_distribution()
        if adversarial.backward == "replay" and self.args.gradient_accumulation_steps > 1:
            raise ValueError(
                f"args: expected gradient_accumulation_steps 1 for {adversarial.method}, which updates the model "
                f"at each replay of a batch, got {self.args.gradient_accumulation_steps}"
            )
        self.objective = self.create_objective(self.model)
        if self.objective.process_group is not None:
            raise ValueError("process_group: expected None of create_objective, since the Trainer counts the labels")
        self._noise_seed: Tensor | None = None
        self._noise_step: tuple[TrainerState, int] | None = None
        self._noise_samples = 0
        self._followed: torch.optim.Optimizer | None = None

    def create_objective(self, model: nn.Module) -> AdversarialObjective:
        """The objective of a model; override it to name a head that is not recognised from the model's class."""
        return AdversarialObjective(model, self.adversarial)

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The parent's; from its second call on the objective goes with the new model."""
        model = super().call_model_init(*args, **kwargs)
        if self.objective is not None:
            self.objective.remove_hooks()
            self.objective = self.create_objective(model)
            self._followed = None
        return model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The adversarial loss of a micro-batch in training, the parent's loss outside of it.

        Args:
            model: the model as the Trainer prepared it.
            inputs: its arguments, labels included.
            return_outputs: also return what the model gave in the clean pass.
            num_items_in_batch: items of the whole optimizer step, or None if the Trainer does not count them.
        """
        if not (model.training and torch.is_grad_enabled()):
            return super().compute_loss(
                model, _without_index(inputs), return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        batch = dict(inputs)
        samples = batch.pop(SAMPLE_KEY, None)
        items = None if num_items_in_batch is None else self._count_items(batch)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

        outside = self.compute_loss_func is not None or self.label_smoother is not None

        def run_task(module: nn.Module, part: Mapping[str, Any]) -> tuple[Tensor, Any]:
            # losses outside the model divide by the count that they are given; heads take the mean
            counts = items is not None and outside
            loss, outputs = super(AdversarialTrainer, self).compute_loss(
                module,
                dict(part),
                return_outputs=True,
                num_items_in_batch=items.clamp(min=1) if counts else None,
            )
            if counts and processes > 1:
                loss = loss / processes  # the parent multiplied, and the whole loss is multiplied below
            # the mean over no labelled position is 0 / 0, with a zero gradient
            return (loss if items is None else torch.where(self._count_items(part) > 0, loss, 0)), outputs

        self.objective.model = model
        self._keep_pace()
        if samples is None and self.adversarial.delta_lifetime > 1:
            raise ValueError(
                f"train_dataset: expected a column {SAMPLE_KEY!r} with delta_lifetime "
                f"{self.adversarial.delta_lifetime}, got {', '.join(batch)}"
            )
        seed, sample_offset = self._place_of(find_batch_size(batch))

        def of_step(loss: Tensor) -> Tensor:
            return loss if items is None else loss * (items * processes) / num_items_in_batch

        result = self.objective.forward(
            batch,
            run_task=run_task,
            standard_loss=not outside,
            seed=seed,
            sample_offset=sample_offset,
            backward=lambda earlier: self.accelerator.backward(
                of_step(earlier) * self._accumulation_share(num_items_in_batch)
            ),
            update=self._update if self.adversarial.backward == "replay" else None,
            samples=samples.cpu() if self.adversarial.delta_lifetime > 1 and samples is not None else None,
        )
        loss = of_step(result.loss)
        return (loss, result.outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The parent's, which does not show the model the index of a sample."""
        return super().prediction_step(model, _without_index(inputs), *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.adversarial.delta_lifetime > 1 and SAMPLE_KEY not in self._signature_columns:
            self._signature_columns.append(SAMPLE_KEY)

    def _keep_pace(self) -> None:
        """Tell the objective the Trainer's step, and its teacher the optimizer."""
        self.objective.set_progress(self.state.global_step, self.state.max_steps)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if self.adversarial.proximal > 0 and self._followed is not optimizer:
            self.objective.follow(optimizer)
            self._followed = optimizer

    def _accumulation_share(self, num_items_in_batch: Tensor | int | None) -> float:
        """The factor that the parent puts on the loss of a micro-batch."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        return 1.0 if scaled else 1.0 / self.current_gradient_accumulation_steps

    def _update(self) -> None:
        """An optimizer step between two replays of a batch."""
        if self.args.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The parent's, with the telemetry since the last training log."""
        if "loss" in logs:
            logs.update({f"adv_{name}": value for name, value in self.objective.telemetry.read().items()})
        super().log(logs, *args, **kwargs)

    def _check_distribution(self) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                f"args: expected one device a process, got {self.args.n_gpu} GPUs in this one, which the Trainer puts "
                "under DataParallel, whose replicas carry no hooks; start one process a GPU with torchrun, "
                "or set CUDA_VISIBLE_DEVICES"
            )
        kind = str(self.accelerator.distributed_type.value)
        if kind != "NO" and not kind.startswith("MULTI_"):
            why = ", which was never tested with the Trainer; a loop of your own can use fully_shard"
            raise ValueError(
                f"args: expected a single process or DistributedDataParallel, got {kind}{why if kind == 'FSDP' else ''}"
            )
        if is_fully_sharded(self.model):
            raise ValueError("model: expected one without fully_shard, which was never tested with the Trainer")
        for name in ("tp", "cp", "sp"):
            size = getattr(self, f"get_{name}_size", lambda: 1)()
            if size > 1:
                raise ValueError(f"args: expected no {name} parallelism, got a size of {size}")

    def _count_items(self, batch: Mapping[str, Any]) -> Tensor:
        """Items of a micro-batch as the Trainer counts those of a step: labels that are not ignored."""
        labels = batch.get("shift_labels")
        if labels is None:
            labels = batch["labels"]
            if getattr(self, "_loss_shifts_labels", False):
                labels = labels[..., 1:]
        return labels.ne(IGNORED_LABEL).sum()

    def _place_of(self, samples: int) -> tuple[Tensor, int]:
        """Seed of the present optimizer step, and the place of this process's next samples in the step's batch."""
        state = self.state
        if self._noise_step is None or self._noise_step[0] is not state or self._noise_step[1] != state.global_step:
            self._noise_step = (state, state.global_step)
            self._noise_seed = self.objective.draw_seed()
            self._noise_samples = 0
        sample_offset = self._noise_samples + self.accelerator.process_index * samples
        self._noise_samples += self.accelerator.num_processes * samples
        return self._noise_seed, sample_offset

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            torch.save(self.objective.state_dict(), os.path.join(output_dir, STATE_NAME))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, STATE_NAME)
        if os.path.isfile(path):
            self.objective.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        else:
            warnings.warn(f"{checkpoint}: no {STATE_NAME}, so the noise starts anew", stacklevel=2)


def _without_index(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != SAMPLE_KEY}
