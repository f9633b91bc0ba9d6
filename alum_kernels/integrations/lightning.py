"""PyTorch Lightning: a mixin by which a ``LightningModule`` trains with the adversarial objective.

It uses nothing of Lightning but the module that it is mixed into, so ``lightning`` and ``pytorch_lightning`` are one.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from alum_kernels.adversarial.noise_place import NoisePlace
from alum_kernels.adversarial.objectives import AdversarialObjective
from alum_kernels.adversarial.run import Samples, Update
from alum_kernels.adversarial.samples import sample_count

CHECKPOINT_KEY = "alum_kernels"
"""Entry of a checkpoint that holds the state of the noise and of a teacher."""

STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")

Result = TypeVar("Result")


class AdversarialModuleMixin:
    """``class Mine(AdversarialModuleMixin, LightningModule)`` with :meth:`configure_adversarial`.

    ``training_step`` then returns ``self.adversarial_loss(batch)``. Lightning differentiates it, clips gradients,
    accumulates and steps as with any other loss. Methods with several backwards (``config.trains_in_parts``) need
    manual optimization (``self.automatic_optimization = False``) and :meth:`adversarial_backward`.

    Every optimizer step draws one seed, and a sample's noise is a function of it and of the sample's place in the
    step's batch: neither ``accumulate_grad_batches`` nor the number of processes changes it. Schedules go by the
    Trainer's steps, and a teacher follows its optimizer. Every ``log_every_n_steps`` the figures of
    :class:`alum_kernels.adversarial.telemetry.Telemetry` are logged as ``adv_divergence``, ``adv_ascent_gain`` and so
    on; with several processes they are those of each process's own share. Checkpoints carry the state of the noise and
    of a teacher; a module that overrides ``on_save_checkpoint`` or ``on_load_checkpoint`` calls ``super()``.

    On a single device, or under ``DDPStrategy`` without a static graph.

    Example::

        class Classifier(AdversarialModuleMixin, lightning.LightningModule):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def configure_adversarial(self):
                return AdversarialObjective(self.model, AdversarialConfig.smart())

            def training_step(self, batch, batch_idx):
                return self.adversarial_loss(batch)

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), lr=1e-4)
    """

    _objective: AdversarialObjective | None = None
    _adversarial_state: Mapping[str, Any] | None = None
    _adversarial_optimizers: Any = None
    _adversarial_total: int | None = None
    _adversarial_logged = -1

    def configure_adversarial(self) -> AdversarialObjective:
        """The objective of the model inside this module; called once, when it is first needed."""
        raise NotImplementedError(
            f"configure_adversarial: expected {type(self).__name__} to return an AdversarialObjective of its model"
        )

    @property
    def adversarial(self) -> AdversarialObjective:
        """The objective of :meth:`configure_adversarial`."""
        if self._objective is None:
            objective = self.configure_adversarial()
            if not isinstance(objective, AdversarialObjective):
                raise TypeError(
                    f"configure_adversarial: expected an AdversarialObjective, got {type(objective).__name__}"
                )
            if self._adversarial_state is not None:
                objective.load_state_dict(self._adversarial_state)
                self._adversarial_state = None
            self._objective = objective
        return self._objective

    def adversarial_loss(self, batch: Mapping[str, Any], samples: Samples | None = None) -> Tensor:
        """The loss of a batch, for ``training_step`` to return.

        Args:
            batch: arguments of the model, labels included.
            samples: as of :meth:`AdversarialObjective.forward`.

        Raises:
            ValueError: the method has several backwards, or the Trainer distributes in a way that is not supported.
            RuntimeError: called where no gradients are recorded, as in ``validation_step``.
        """
        config = self.adversarial.config
        if config.trains_in_parts:
            raise ValueError(
                f"training_step: expected adversarial_backward(batch) with automatic_optimization = False for "
                f"{config.method}, whose steps have several backwards, got adversarial_loss"
            )
        return self._adversarial_step(self.adversarial.forward, batch, samples=samples).loss

    def adversarial_backward(
        self,
        batch: Mapping[str, Any],
        scale: float | Tensor = 1.0,
        update: Update | None = None,
        samples: Samples | None = None,
    ) -> dict[str, Tensor]:
        """All passes of a batch and their backwards by ``manual_backward``, in manual optimization.

        Clipping and the optimizer's step are the caller's, as is ``scale``, one over the number of accumulated batches.

        Args:
            batch, scale, update, samples: as of :meth:`AdversarialObjective.backward`.

        Returns:
            Detached device scalars ``loss``, ``task_loss`` and ``divergence``, before ``scale``.

        Raises:
            ValueError: optimization is automatic: it zeroes the gradients of earlier backwards.
        """
        if self.automatic_optimization:
            raise ValueError(
                "adversarial_backward: expected manual optimization, got automatic, which zeroes gradients after "
                "training_step; set self.automatic_optimization = False in __init__, or return adversarial_loss(batch)"
            )
        options = {"scale": scale, "backward": self.manual_backward, "update": update, "samples": samples}
        return self._adversarial_step(self.adversarial.backward, batch, **options)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY] = self.adversarial.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get(CHECKPOINT_KEY)
        if state is None:
            warnings.warn(f"checkpoint: no entry {CHECKPOINT_KEY!r}, so the noise starts anew", stacklevel=2)
        elif self._objective is not None:
            self._objective.load_state_dict(state)
        else:
            self._adversarial_state = state  # hooks are not wanted on a model that is only to be used

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in ("_objective", "_adversarial_optimizers", "_noise"):  # of this process and this training
            state.pop(name, None)
        return state

    def _adversarial_step(self, run: Callable[..., Result], batch: Mapping[str, Any], **options: Any) -> Result:
        """One of the objective's steps at its place in the training, and the telemetry where it is due."""
        if not torch.is_grad_enabled():
            raise RuntimeError("adversarial_loss: expected a call in training_step, got one without gradients")
        objective = self.adversarial
        if self._adversarial_optimizers is not self.trainer.optimizers:  # each fit makes its own
            self._begin_training(objective)
        step, count = self.trainer.global_step, sample_count(batch)
        objective.set_progress(step, self._adversarial_total)
        seed, sample_offset = self._noise.next(count, step)
        result = run(batch, seed=seed, sample_offset=sample_offset, **options)
        every = self.trainer.log_every_n_steps
        if every and (step + 1) % every == 0 and step != self._adversarial_logged:
            self._adversarial_logged = step
            figures = objective.telemetry.read()
            self.log_dict({f"adv_{name}": value for name, value in figures.items()}, batch_size=count)
        return result

    def _begin_training(self, objective: AdversarialObjective) -> None:
        trainer = self.trainer
        strategy = trainer.strategy
        if not any(kind.__name__ in STRATEGIES for kind in type(strategy).__mro__):
            raise ValueError(
                f"strategy: expected a single device or DDPStrategy, got {type(strategy).__name__}, which shards or "
                "replicates a model by other means"
            )
        if getattr(strategy.model, "static_graph", False):
            raise ValueError(
                "strategy: expected DDPStrategy without static_graph, which takes every step for the same as the first"
            )
        total = trainer.estimated_stepping_batches
        self._adversarial_total = int(total) if math.isfinite(total) and total >= 0 else None
        self._noise = NoisePlace(objective, trainer.global_rank, trainer.world_size)
        self._adversarial_logged = -1
        if objective.config.proximal > 0:
            optimizer = self.optimizers(use_pl_optimizer=False)
            if isinstance(optimizer, list):
                raise ValueError(
                    f"configure_optimizers: expected one optimizer for a teacher to follow, got {len(optimizer)}"
                )
            objective.follow(optimizer)
        self._adversarial_optimizers = trainer.optimizers
