"""The Hugging Face ``Trainer``, or a subclass of it, with one more argument, ``adversarial``.

A micro-batch's loss is the mean over its items, of the task and of the divergence alike. Where the Trainer counts the
items of a whole optimizer step, the loss is

    (task mean + alpha * divergence mean) * items of the micro-batch / items of the step  [* processes]

so that accumulated micro-batches add up to the one batch that they split, also for heads that ignore the Trainer's
count. The last factor is there when the count runs over all processes, whose gradients are then averaged.

Methods that train on every pass of their ascent differentiate all but the last in ``compute_loss``, with the factor
that the Trainer puts on the loss it is given.
"""

import inspect
import os
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from alum_kernels.adversarial.config import AdversarialConfig
from alum_kernels.adversarial.model_state import original, unwrap
from alum_kernels.adversarial.noise_place import NoisePlace
from alum_kernels.adversarial.objectives import AdversarialObjective

try:
    from accelerate.utils import find_batch_size
    from transformers import Trainer

    from alum_kernels.integrations.finite_steps import FiniteSteps
    from alum_kernels.integrations.sft_loss import SupervisedFineTuningLoss
    from alum_kernels.integrations.step_watch import StepWatch
    from alum_kernels.integrations.trainer_counts import count_items, loss_is_scaled, micro_batches
    from alum_kernels.integrations.trainer_distribution import check_distribution
    from alum_kernels.integrations.trainer_losses import OwnLoss, ParentLoss
except ImportError as error:
    raise ImportError(
        "alum_kernels.integrations.transformers: expected transformers and accelerate to be installed; "
        "pip install 'alum-kernels[transformers]'"
    ) from error

SAMPLE_KEY = "sample_index"
"""Column of a dataset that identifies its samples, for perturbations that are kept (``delta_lifetime``)."""

STATE_NAME = "adversarial_state.pt"
"""File of a checkpoint folder that holds the state of the noise."""


class AdversarialTrainerMixin:
    """Makes the training loss of a ``transformers.Trainer`` the task's plus ``alpha`` times an adversarial divergence.

    ``class Mine(AdversarialTrainerMixin, TheirTrainer)``, or :func:`adversarial_trainer` ``(TheirTrainer)``, trains a
    subclass of ``transformers.Trainer`` so; :class:`AdversarialTrainer` is the one of ``Trainer`` itself.

    Evaluation and prediction are the parent's. Wherever the parent logs ``loss`` (which then includes the adversarial
    term), the figures of :class:`alum_kernels.adversarial.telemetry.Telemetry` stand beside it as ``adv_divergence``,
    ``adv_ascent_gain`` and so on; with several processes they are those of each process's own share. Every optimizer
    step draws one seed, and each sample's noise is a function of that seed and its place in the step's batch: neither
    gradient accumulation nor the number of processes changes it. Checkpoints carry the state of the noise.

    Optimizer steps whose loss or gradients are not finite are left out (:class:`alum_kernels.FiniteGuard`). The first
    one warns, the log counts them as ``adv_skipped_steps``, and ten in a row stop the training with the reason.

    A language model with a linear head is trained without its logits (:class:`AdversarialObjective`): in training its
    outputs then have none, and its loss is computed beside the model. A loss outside the model (``compute_loss_func``,
    label smoothing) keeps the logits.

    A ``compute_loss`` of the subclass is the task's loss: it runs as it is, on the clean batch, and keeps the logits.
    It calls the model once, and gives the outputs of that call with ``return_outputs=True``. It sees the micro-batch as
    a whole optimizer step of one process: ``num_items_in_batch`` is the micro-batch's, and a loss that divides by the
    accumulated steps divides by one; what follows of that is done here. (A loss that is no mean over its items is taken
    for one.) A ``training_step`` of the subclass stays, as long as it calls ``compute_loss``; if it puts a factor of
    its own on the loss, ``loss_is_scaled_for_ga`` says whether that is one over the accumulated steps. A
    ``compute_loss`` in a class *before* the mixin wraps the whole adversarial loss, which ``super()`` gives it.

    TRL's ``SFTTrainer`` keeps its loss, its token accuracy and entropy, and its way without logits
    (:mod:`alum_kernels.integrations.sft_loss`): the method must be one for which no logits are formed either.

    Schedules go by the Trainer's steps, a teacher follows its optimizer, and methods that replay a batch make an
    optimizer step (with gradient clipping) after each replay; the learning rate schedule counts batches.

    Perturbations that serve several visits of a sample (``delta_lifetime``) need a dataset with a column
    ``sample_index``, an int that no other sample has; it is read back from the device, once a batch. Each process keeps
    its own, and a checkpoint has none.

    Runs in one process or under ``DistributedDataParallel``.

    Args:
        model, args: as of the parent, and so are all other arguments.
        adversarial: the method and its constants.

    Attributes:
        objective: the model's, from the end of ``__init__`` on.
        task_columns: columns of a batch that only ``compute_loss`` reads, labels apart. Those that the model's forward
            cannot take are known without.

    Raises:
        TypeError: ``adversarial`` is no :class:`AdversarialConfig`.
        RuntimeError: the first optimizer step ended without this loss: a class before the mixin replaces it or its
            ``training_step``, or a ``training_step`` does without ``compute_loss``.
        ValueError: the model has no head or no input embeddings that :class:`AdversarialObjective` recognises (override
            :meth:`create_objective`), or the arguments ask for a way to distribute that is not supported.
    """

    objective: AdversarialObjective | None = None
    task_columns: tuple[str, ...] = ()

    def __init__(self, *args: Any, adversarial: AdversarialConfig, **kwargs: Any) -> None:
        if not isinstance(adversarial, AdversarialConfig):
            raise TypeError(f"adversarial: expected an AdversarialConfig, got {type(adversarial).__name__}")
        model = kwargs.get("model", args[0] if args else None)
        if isinstance(model, nn.Module):
            unwrap(model)  # DataParallel is refused before the Trainer moves it
        self.adversarial = adversarial
        super().__init__(*args, **kwargs)
        check_distribution(self)
        if adversarial.backward == "replay" and self.args.gradient_accumulation_steps > 1:
            raise ValueError(
                f"args: expected gradient_accumulation_steps 1 for {adversarial.method}, which updates the model "
                f"at each replay of a batch, got {self.args.gradient_accumulation_steps}"
            )
        self._task = self._task_loss()
        self._take(self.create_objective(self.model))
        self.finite = FiniteSteps()
        self.add_callback(self.finite)
        self._watch = StepWatch(self, AdversarialTrainerMixin)
        self.add_callback(self._watch)

    def create_objective(self, model: nn.Module) -> AdversarialObjective:
        """The objective of a model; override it to name a head that is not recognised from the model's class."""
        return AdversarialObjective(model, self.adversarial)

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The parent's; from its second call on the objective goes with the new model."""
        model = super().call_model_init(*args, **kwargs)
        if self.objective is not None:
            self.objective.remove_hooks()
            self._take(self.create_objective(model))
        return model

    def _take(self, objective: AdversarialObjective) -> None:
        if objective.process_group is not None:
            raise ValueError("process_group: expected None of create_objective, since the Trainer counts the labels")
        self._task.check(objective)
        self.objective = objective
        self._noise = NoisePlace(objective, self.accelerator.process_index, self.accelerator.num_processes)
        self._followed: torch.optim.Optimizer | None = None
        taken = inspect.signature(type(original(objective.model)).forward).parameters
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
        self._accepted = None if takes_any else set(taken)

    def _task_loss(self) -> ParentLoss:
        """How the class after the mixin computes the task's loss."""
        compute_loss = super().compute_loss
        found = getattr(compute_loss, "__func__", compute_loss)
        if found is Trainer.compute_loss:
            return ParentLoss(self, compute_loss)
        if (found.__module__, found.__qualname__) == ("trl.trainer.sft_trainer", "SFTTrainer.compute_loss"):
            return SupervisedFineTuningLoss(self, compute_loss)
        return OwnLoss(self, compute_loss)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's; its first step draws a seed of its own."""
        self._noise.begin()
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The parent's; then it is decided whether the gradients are finite, and the optimizer may have them."""
        with self.objective.memory_advice(inputs):
            loss = super().training_step(model, inputs, *args, **kwargs)
        self._watch.reach("training_step")
        if self.accelerator.sync_gradients:
            self.finite.decide(self.model, self.accelerator.scaler)
        return loss

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
        items = None if num_items_in_batch is None else count_items(self, batch)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

        def run_task(module: nn.Module, part: Mapping[str, Any]) -> tuple[Tensor, Any]:
            own_items = None if items is None else count_items(self, part)
            loss, outputs = self._task.of(module, part, own_items)
            # the mean over no labelled position is 0 / 0, with a zero gradient
            return (loss if own_items is None else torch.where(own_items > 0, loss, 0)), outputs

        self.objective.model = model
        self._keep_pace()
        if samples is None and self.adversarial.delta_lifetime > 1:
            raise ValueError(
                f"train_dataset: expected a column {SAMPLE_KEY!r} with delta_lifetime "
                f"{self.adversarial.delta_lifetime}, got {', '.join(batch)}"
            )
        seed, sample_offset = self._noise.next(find_batch_size(batch), self.state.global_step)
        scaled = loss_is_scaled(self, num_items_in_batch)

        def of_step(loss: Tensor) -> Tensor:
            return loss / micro_batches(self) if items is None else loss * (items * processes) / num_items_in_batch

        def differentiate(earlier: Tensor) -> None:
            # the parent divides none but the last loss, which is returned
            self.accelerator.backward(of_step(earlier) if scaled else earlier / micro_batches(self))

        result = self.objective.forward(
            self._task.inputs(batch),
            run_task=run_task,
            standard_loss=self._task.standard,
            loss_without_logits=self._task.without_logits,
            task_keys={*self.task_columns, *(set() if self._accepted is None else set(batch) - self._accepted)},
            seed=seed,
            sample_offset=sample_offset,
            backward=differentiate,
            update=self._update if self.adversarial.backward == "replay" else None,
            samples=samples.cpu() if self.adversarial.delta_lifetime > 1 and samples is not None else None,
        )
        self.finite.guard.watch(result.figures(), batch)
        self._watch.reach("compute_loss")
        loss = of_step(result.loss) if scaled else result.loss
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

    def _update(self) -> None:
        """An optimizer step between two replays of a batch."""
        self.finite.decide(self.model, self.accelerator.scaler)
        if self.args.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        else:
            self.accelerator.unscale_gradients()  # a scaler cannot, once they are dropped
        self.finite.drop(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The parent's, with the telemetry since the last training log."""
        if "loss" in logs:
            logs.update({f"adv_{name}": value for name, value in self.objective.telemetry.read().items()})
            if self.finite.guard.skipped:
                logs["adv_skipped_steps"] = self.finite.guard.skipped
        super().log(logs, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            state = {**self.objective.state_dict(), "finite": self.finite.guard.state_dict()}
            torch.save(state, os.path.join(output_dir, STATE_NAME))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, STATE_NAME)
        if os.path.isfile(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.objective.load_state_dict(state)
            if "finite" in state:
                self.finite.guard.load_state_dict(state["finite"])
        else:
            warnings.warn(f"{checkpoint}: no {STATE_NAME}, so the noise starts anew", stacklevel=2)


class AdversarialTrainer(AdversarialTrainerMixin, Trainer):
    """``transformers.Trainer`` with an adversary; all that it does is in :class:`AdversarialTrainerMixin`.

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


@cache
def adversarial_trainer(trainer: type[Trainer]) -> type[Trainer]:
    """A subclass of a Trainer class that takes ``adversarial``: :class:`AdversarialTrainerMixin` before it.

    Args:
        trainer: ``transformers.Trainer`` or any subclass, such as TRL's ``SFTTrainer``.

    Returns:
        The class, the same one at every call; a class that has the mixin already as it is.

    Raises:
        TypeError: ``trainer`` is no subclass of ``transformers.Trainer``.

    Example:
        >>> import transformers
        >>> from alum_kernels.integrations.transformers import adversarial_trainer
        >>> class Weighted(transformers.Trainer):
        ...     def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        ...         outputs = model(**inputs)
        ...         loss = 2 * outputs.loss
        ...         return (loss, outputs) if return_outputs else loss
        >>> adversarial_trainer(Weighted).__name__
        'AdversarialWeighted'
    """
    if not (isinstance(trainer, type) and issubclass(trainer, Trainer)):
        raise TypeError(f"trainer: expected a subclass of transformers.Trainer, got {trainer!r}")
    if issubclass(trainer, AdversarialTrainerMixin):
        return trainer
    if trainer is Trainer:
        return AdversarialTrainer
    doc = f"``{trainer.__name__}`` with an adversary, see :class:`AdversarialTrainerMixin`."
    members = {"__doc__": doc, "__module__": trainer.__module__}
    return type(f"Adversarial{trainer.__name__}", (AdversarialTrainerMixin, trainer), members)


def _without_index(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != SAMPLE_KEY}
