"""What a training run is asked to do: one table of settings, for flags, settings files and the record of a run."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alum_kernels.training import values
from alum_kernels.training.errors import TrainingError
from alum_kernels.training.methods import CONSTANTS, METHODS

CLASSIFICATION, REGRESSION, MASKED_LM, CAUSAL_LM = TASKS = ("classification", "regression", "masked-lm", "causal-lm")
"""What a model is trained to predict."""

LABELLED = (CLASSIFICATION, REGRESSION)
MOST_THREADS = 1 << 16
PRECISIONS = ("fp32", "bf16", "fp16")


def _setting(default: Any, convert: values.Convert, about: str) -> Any:
    return field(default=default, metadata={"convert": convert, "help": about})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides a run; the names are those of flags and of keys in a settings file."""

    train: str = _setting(None, values.text, "training data: .tsv, .csv, .jsonl or .txt, or hub:NAME[:CONFIGURATION]")
    dev: str | None = _setting(None, values.optional(values.text), "development data, evaluated now and then")
    task: str = _setting(CLASSIFICATION, values.choice(*TASKS), f"one of {', '.join(TASKS)}")
    model: str | None = _setting(
        None, values.optional(values.path), "folder or Hub name of a pretrained model (default: the bundled MiniLM)"
    )
    method: str = _setting("standard", values.text, f"one of {', '.join(METHODS)}")
    text: tuple[str, ...] = _setting((), values.columns, "columns of the text, one or two")
    label: str = _setting("", str, "column of the label")
    output: str = _setting(None, values.path, "folder of checkpoints, log and trained model")

    steps: int | None = _setting(None, values.optional(values.whole(1)), "optimizer steps (default: from the epochs)")
    epochs: float = _setting(3.0, values.number(above=True), "passes over the training data")
    batch_size: int = _setting(16, values.whole(1), "samples of a batch")
    accumulation: int = _setting(1, values.whole(1), "batches of an optimizer step")
    length: int = _setting(128, values.whole(8), "tokens of a sample at most")
    learning_rate: float = _setting(5e-5, values.number(above=True), "its peak")
    warm_up: float = _setting(0.1, values.number(0.0, 1.0), "share of the steps in which the learning rate rises")
    weight_decay: float = _setting(0.01, values.number(), "of AdamW")
    clip: float = _setting(1.0, values.number(), "largest norm of the gradient; 0 does not clip")
    mask_shares: tuple[float, ...] = _setting(
        (0.05, 0.10, 0.15, 0.20, 0.25), values.shares, "masked shares of the tokens, in equal parts of the training"
    )
    precision: str = _setting("fp32", values.choice(*PRECISIONS), f"of the passes: one of {', '.join(PRECISIONS)}")
    gradient_checkpointing: bool = _setting(False, values.switch, "recompute activations instead of keeping them")
    device: str | None = _setting(None, values.optional(values.text), "cpu, cuda, cuda:1 (default: cuda where it is)")
    threads: int | None = _setting(None, values.optional(values.whole(1, MOST_THREADS)), "of the CPU")
    seed: int = _setting(0, values.whole(0), "of a new head, the order, dropout, masks and noise")

    log_every: int = _setting(10, values.whole(1), "steps between two lines of the log")
    eval_every: int = _setting(0, values.whole(0), "steps between two evaluations; 0: at the end")
    save_every: int = _setting(200, values.whole(1), "steps between two checkpoints")
    keep: int = _setting(2, values.whole(1), "checkpoints that are kept")

    constants: Mapping[str, Any] = field(default_factory=dict)
    """Changes of the method's preset, by :data:`alum_kernels.training.methods.CONSTANTS`."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Settings":
        """Settings from what was written, with defaults for the rest.

        Raises:
            TrainingError: a value that does not fit, or one missing that has no default, by the name of the setting.
        """
        found: dict[str, Any] = {}
        for option in options():
            if option.name in given:
                found[option.name] = converted(option.name, option.metadata["convert"], given)
            elif option.name in REQUIRED:
                raise TrainingError(f"{option.name}: expected a value, got none; it has no default")
        constants = {name: converted(name, values.constant, given) for name in CONSTANTS if name in given}
        for name in ("modules", "excluded_tokens"):  # of one member, or with commas
            if name in constants and not isinstance(constants[name], list | tuple):
                constants[name] = [values.parsed(part) for part in str(constants[name]).split(",")]
        return cls(**found, constants=constants)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :meth:`of` takes, every setting in it."""
        plain = {option.name: getattr(self, option.name) for option in options()}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in (*plain.items(), *self.constants.items())
        }


def converted(name: str, convert: values.Convert, given: Mapping[str, Any]) -> Any:
    """One of the values that were written, as what it means.

    Raises:
        TrainingError: it does not fit, by the name of the setting.
    """
    try:
        return convert(given[name])
    except ValueError as error:
        raise TrainingError(f"{name}: {error}") from error


REQUIRED = ("train", "output")
"""Settings without a default."""

HOUSEKEEPING = ("output", "save_every", "keep")
"""Settings that a resumed run may change: they decide no loss."""

PLACES = ("train", "dev")
"""Files that may lie elsewhere when a run is resumed: what is in them is compared, not how they are called."""


def options() -> list[dataclasses.Field]:
    """The settings of the training itself, without the method's constants."""
    return [option for option in dataclasses.fields(Settings) if option.name != "constants"]


def names() -> list[str]:
    """Every name that a flag or a key of a settings file may have."""
    return [option.name for option in options()] + list(CONSTANTS)
