"""A run from its settings to its end, or to where it was asked to stop.

What is a function of the settings and the step is not saved, but computed again: the order of the samples, the masks,
the learning rate, the adversary's schedules. A checkpoint has the rest: the model, the optimizer, the objective with
its noise and its teacher, the generators of dropout, the scale of the loss, and sums that the log has not told yet.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alum_kernels.adversarial.config import AdversarialConfig
from alum_kernels.adversarial.labels import IGNORED_LABEL
from alum_kernels.training import atomic
from alum_kernels.training.batches import Batch, Order
from alum_kernels.training.checkpoint import Checkpoint, Checkpoints
from alum_kernels.training.data import Moment, RawData, Samples, samples_of
from alum_kernels.training.errors import TrainingError
from alum_kernels.training.journal import Journal
from alum_kernels.training.learning_rate import linear_share
from alum_kernels.training.methods import adversarial_objective
from alum_kernels.training.models import (
    bundled_model,
    check_length,
    checkpoint_activations,
    load_model,
    load_tokenizer,
)
from alum_kernels.training.optimizer import adamw
from alum_kernels.training.precision import Precision
from alum_kernels.training.random_state import random_state, restore_random_state
from alum_kernels.training.run_folder import MODEL
from alum_kernels.training.scores import scores
from alum_kernels.training.settings import MASKED_LM, Settings
from alum_kernels.training.step import Stepper
from alum_kernels.training.stopping import StopRequest
from alum_kernels.training.window import Window

HELD_OUT = Moment(0, 1, 0)
"""For held-out samples, whose masks do not go with the training."""


class Outcome(NamedTuple):
    """How a run ended: optimizer steps made, whether these are all, and the last figures on the development data."""

    step: int
    finished: bool
    dev: dict[str, float] | None


class Training:
    """One run.

    Args:
        settings: what is asked for.
        config: the method; None is standard training.
        data: the samples.
        checkpoint: where to go on; None is the beginning.
        say: tells a person a line.

    Raises:
        TrainingError: the model, the data or the method do not fit together.
    """

    def __init__(
        self,
        settings: Settings,
        config: AdversarialConfig | None,
        data: RawData,
        checkpoint: Checkpoint | None,
        say: Callable[[str], None],
    ) -> None:
        self.settings, self._say, self._folder = settings, say, Path(settings.output)
        self._device = chosen_device(settings.device)
        source = settings.model or bundled_model() if checkpoint is None else str(checkpoint.folder)
        self._tokenizer = load_tokenizer(source)
        self._samples = samples_of(data.train, settings, self._tokenizer, held_out=False)
        self._dev = None
        if data.dev is not None:
            self._dev = samples_of(data.dev, settings, self._tokenizer, held_out=True)
            _check_held_out(self._dev, settings)
        try:
            self._order = Order(self._samples.count, settings.batch_size, settings.seed, self._samples.lengths)
        except ValueError as error:
            raise TrainingError(f"batch_size: {error}") from error
        steps_of_epoch = self._order.epoch_batches / settings.accumulation
        self.total = settings.steps or max(1, round(settings.epochs * steps_of_epoch))
        torch.manual_seed(settings.seed)
        self._model = load_model(source, settings.task, self._tokenizer, data.classes).to(self._device).train()
        check_length(self._model, settings.length)
        if settings.gradient_checkpointing:
            checkpoint_activations(self._model)
        self._objective = adversarial_objective(self._model, config)
        self._precision = Precision(settings.precision, self._device)
        self._window = Window(self._device)
        self._restore(checkpoint)

    @property
    def summary(self) -> str:
        """What will be done, for people."""
        settings = self.settings
        batch = f"{settings.accumulation} x {settings.batch_size}" if settings.accumulation > 1 else settings.batch_size
        return (
            f"{settings.task} on {self._samples.count} samples with {settings.method}: steps {self._step} to "
            f"{self.total} of {batch}, {settings.precision} on {self._device}"
        )

    def run(self, stop: StopRequest) -> Outcome:
        """Train to the end, or until a signal came and the step was finished and saved."""
        from tqdm.auto import tqdm

        settings, journal = self.settings, Journal(self._folder, self._step)
        checkpoints = Checkpoints(self._folder, settings.keep, self._say)
        dev = None
        progress = tqdm(
            total=self.total, initial=self._step, unit="step", desc=settings.method, dynamic_ncols=True, disable=None
        )
        started = time.perf_counter()
        try:
            while self._step < self.total and stop.received is None:
                self._make_step()
                progress.update()
                last = self._step == self.total
                if self._step % settings.log_every == 0 or last:
                    entry = self._figures()
                    journal.write({**entry, "seconds": time.perf_counter() - started})
                    started = time.perf_counter()
                    progress.set_postfix(_shown(entry))
                if self._dev is not None and (last or (settings.eval_every and self._step % settings.eval_every == 0)):
                    dev = self._evaluate()
                    journal.write({"step": self._step, **{f"dev_{name}": value for name, value in dev.items()}})
                if self._step % settings.save_every == 0 or last or stop.received is not None:
                    journal.sync()
                    checkpoints.write(self._step, self._write_model, self._state())
        finally:
            progress.close()
            journal.close()
            if self._objective is not None:
                self._objective.remove_hooks()
        finished = self._step == self.total
        if finished and dev is None and self._dev is not None:
            dev = self._evaluate()
        return Outcome(self._step, finished, dev)

    def write_model(self) -> Path:
        """The trained model with its tokenizer, whole or not at all; where it lies. Raises WriteError."""
        path = self._folder / MODEL
        with atomic.writing(path):
            partial = atomic.begin_folder(path)
            self._write_model(partial)
            atomic.finish_folder(partial, path)
        return path

    def _make_step(self) -> None:
        settings = self.settings
        if self._objective is not None:
            self._objective.set_progress(self._step, self.total)
        share = linear_share(self._step, self.total, max(1, int(self.total * settings.warm_up)))
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * share
        first = self._step * settings.accumulation
        self._window.add(self._stepper.step([self._batch(first + place) for place in range(settings.accumulation)]))
        self._step += 1

    def _batch(self, number: int) -> Batch:
        epoch, chosen = self._order.batch(number)
        return self._samples.encode(chosen, Moment(self._step, self.total, epoch))

    def _figures(self) -> dict[str, Any]:
        """Of the steps since the last line of the log."""
        settings = self.settings
        telemetry = {} if self._objective is None else self._objective.telemetry.read()
        return {
            "step": self._step,
            "epoch": round(self._step * settings.accumulation / self._order.epoch_batches, 4),
            "learning_rate": self._optimizer.param_groups[0]["lr"],
            **self._window.read(),
            **telemetry,
        }

    def _evaluate(self) -> dict[str, float]:
        batches = batches_in_order(self._dev, self.settings.batch_size)
        return scores(self._model, batches, self.settings.task, self._precision)

    def _write_model(self, folder: Path) -> None:
        self._model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)

    def _state(self) -> dict[str, Any]:
        objective = self._objective
        return {
            "step": self._step,
            "optimizer": self._optimizer.state_dict(),
            "objective": None if objective is None else objective.state_dict(),
            "telemetry": None if objective is None else objective.telemetry.state_dict(),
            "guard": self._stepper.guard.state_dict(),
            "window": self._window.state_dict(),
            "precision": self._precision.state_dict(),
            "random": random_state(),
        }

    def _restore(self, checkpoint: Checkpoint | None) -> None:
        settings, objective = self.settings, self._objective
        state = None if checkpoint is None else checkpoint.state()
        if state is not None and objective is not None:
            objective.load_state_dict(state["objective"])  # a teacher is taken up by the one that follows, below
            objective.telemetry.load_state_dict(state["telemetry"], self._device)
        self._optimizer = adamw(self._model, objective, settings.learning_rate, settings.weight_decay)
        self._stepper = Stepper(self._model, objective, self._optimizer, self._precision, settings.clip)
        self._step = 0
        if state is not None:
            self._stepper.guard.load_state_dict(state["guard"])
            self._step = state["step"]
            self._optimizer.load_state_dict(state["optimizer"])
            self._window.load_state_dict(state["window"])
            self._precision.load_state_dict(state["precision"])
            restore_random_state(state["random"])


def batches_in_order(samples: Samples, size: int) -> list[Batch]:
    """All held-out samples, a last batch that is smaller included."""
    return list(_each_in_order(samples, size))


def _each_in_order(samples: Samples, size: int) -> Iterator[Batch]:
    for group in torch.arange(samples.count).split(size):
        yield samples.encode(group.tolist(), HELD_OUT)


def _check_held_out(samples: Samples, settings: Settings) -> None:
    """Before the training, not at the end of it: its masks are the same in every evaluation.

    Raises:
        TrainingError: no token of it is predicted.
    """
    batches = _each_in_order(samples, settings.batch_size)
    if settings.task == MASKED_LM and not any(bool((one["labels"] != IGNORED_LABEL).any()) for one in batches):
        raise TrainingError(
            f"{settings.dev}: expected text of which some token is masked, got {samples.count} blocks of "
            f"length {settings.length} without one"
        )


def _shown(entry: dict[str, Any]) -> dict[str, str]:
    gain = {"gain": f"{entry['ascent_gain']:.3g}"} if "ascent_gain" in entry else {}
    return {"loss": f"{entry['loss']:.4f}", **gain}


def chosen_device(name: str | None) -> torch.device:
    """The device that is named, or the best there is.

    Raises:
        TrainingError: there is no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.ones(1, device=device).item()  # of meta tensors, which hold nothing, there is no value
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]  # PyTorch goes on with all the kinds that there are
        raise TrainingError(f"device: expected one that is here, got {name!r}: {reason}") from error
    return device
