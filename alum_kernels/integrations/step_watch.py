"""Whether the optimizer steps of a Trainer have an adversary, whatever its subclasses override."""

from typing import Any

from transformers import Trainer, TrainerCallback

from alum_kernels.integrations.trainer_losses import name_of

METHODS = ("compute_loss", "training_step")


class StepWatch(TrainerCallback):
    """Refuses a training whose first optimizer step did not go through the mixin's own methods.

    Args:
        trainer: of a class with the mixin; :meth:`reach` is called by its methods.
        mixin: the class.
    """

    def __init__(self, trainer: Trainer, mixin: type) -> None:
        self._trainer, self._mixin = trainer, mixin
        self._reached: set[str] = set()

    def reach(self, method: str) -> None:
        """A method of the mixin ran."""
        self._reached.add(method)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._reached.clear()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Raises RuntimeError, naming who replaced a method of the mixin."""
        missing = [method for method in METHODS if method not in self._reached]
        if not missing:
            return
        kind, mixin = type(self._trainer), self._mixin
        replaced = [getattr(kind, name) for name in METHODS if getattr(kind, name) is not getattr(mixin, name)]
        culprits = replaced or [super(mixin, self._trainer).training_step]
        raise RuntimeError(
            f"{kind.__name__}: expected a training that calls {' and '.join(missing)} of {mixin.__name__}, got an "
            f"optimizer step that did not; {' or '.join(map(name_of, culprits))} does without. Put what is your own "
            f"into a class after the mixin: class Mine({mixin.__name__}, TheirTrainer)"
        )
