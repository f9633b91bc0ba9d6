"""The folder of a run: what it was asked for, what it was made from, and whether it may be gone on with.

settings.json     the settings, as --config takes them; there from the beginning of the run
record.json       the method's constants in full, fingerprints of the data, versions
log.jsonl         losses and evaluations
checkpoint-N/     see checkpoint.py
model/            the trained model, at the end
results.json      its figures, at the end
"""

import fcntl
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import alum_kernels
from alum_kernels.adversarial.config import AdversarialConfig
from alum_kernels.training import atomic, journal
from alum_kernels.training.checkpoint import PREFIX
from alum_kernels.training.errors import TrainingError
from alum_kernels.training.json_object import json_object
from alum_kernels.training.settings import HOUSEKEEPING, PLACES, Settings

DATA = {"train", "dev"}
"""What a record has fingerprints of."""

SETTINGS, RECORD, MODEL, RESULTS = "settings.json", "record.json", "model", "results.json"


def begun(folder: Path) -> bool:
    """Whether a run began there.

    Raises:
        TrainingError: the system knows no such name.
    """
    try:
        return (folder / SETTINGS).is_file()
    except OSError as error:
        raise TrainingError(f"output: {folder}: {error.strerror or error}") from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other runs out of it for as long as the context, or the process, is there.

    Two runs in one folder would each remove what the other is writing.

    Raises:
        TrainingError: another run is in it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise TrainingError(f"output: {folder}: {error.strerror or error}") from error
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TrainingError(f"output: expected a folder that no other run is in, got {folder}, where one is") from error
    except OSError as error:
        raise TrainingError(f"output: {folder} cannot be locked: {error.strerror}") from error


def prepare(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Have an empty folder: remove an old run, or what an interrupted one left half written.

    Raises:
        TrainingError: the folder has something in it, or is none.
    """
    try:
        atomic.remove_partial(folder)
        if overwrite:
            _remove_run(folder)
        found = sorted(path.name for path in folder.iterdir() if path.name != RECORD)  # alone, it is of no run yet
        if found and not (resume and begun(folder)):
            raise TrainingError(
                f"output: expected an empty folder, got {folder} with {', '.join(found[:4])} in it; "
                "--resume goes on with a run, --overwrite removes it"
            )
    except OSError as error:
        raise TrainingError(f"output: {folder}: {error.strerror or error}") from error


def _remove_run(folder: Path) -> None:
    """Only what a run writes: the folder may hold other things."""
    for name in (SETTINGS, RECORD, RESULTS, journal.NAME):  # settings first: what is left is no run
        (folder / name).unlink(missing_ok=True)
    for path in [folder / MODEL, *folder.glob(f"{PREFIX}*")]:
        if path.is_dir():
            shutil.rmtree(path)


def resumed_settings(folder: Path, given: Mapping[str, Any]) -> Settings:
    """Those that a run began with, and of what is given now what may change.

    Raises:
        TrainingError: something else is given than the run began with.
    """
    began = _read(folder / SETTINGS)
    asked = Settings.of({**began, **given}).to_dict()
    for name in given:
        if name not in (*HOUSEKEEPING, *PLACES) and asked.get(name) != began.get(name):
            raise TrainingError(
                f"{name}: expected {began.get(name)!r} as the run in {folder} began, got {asked.get(name)!r}; "
                "leave it out to go on, or choose another --output"
            )
    return Settings.of({**began, **{name: given[name] for name in (*HOUSEKEEPING, *PLACES) if name in given}})


def record_of(config: AdversarialConfig | None, fingerprints: Mapping[str, str | None]) -> dict[str, Any]:
    """What a run is made from."""
    return {
        "adversarial": None if config is None else config.to_dict(),
        "fingerprints": dict(fingerprints),
        "versions": {
            "alum_kernels": alum_kernels.__version__,
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
        },
    }


def write_begin(folder: Path, settings: Settings, record: Mapping[str, Any]) -> None:
    """From here on the run can be gone on with."""
    atomic.write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
    atomic.write_text(folder / SETTINGS, json.dumps(settings.to_dict(), indent=1) + "\n")


def check_record(folder: Path, settings: Settings, record: Mapping[str, Any]) -> str | None:
    """Compare what a run was made from with what it would be made from now.

    Returns:
        A line for people where versions differ, else None.

    Raises:
        TrainingError: the data or the method's constants are others, or the record is damaged.
    """
    began = _read(folder / RECORD)
    parts = [began.get(name) for name in ("fingerprints", "versions")]
    if "adversarial" not in began or not all(isinstance(part, dict) for part in parts) or not parts[0].keys() >= DATA:
        raise TrainingError(
            f"{folder / RECORD}: damaged: expected the keys adversarial, fingerprints (of {', '.join(sorted(DATA))}) "
            "and versions"
        )
    for part in ("train", "dev"):
        if began["fingerprints"][part] != record["fingerprints"][part]:
            raise TrainingError(
                f"{part}: expected the data that the run in {folder} began with, "
                f"{getattr(settings, part) or settings.train} has other content"
            )
    if began["adversarial"] != json.loads(json.dumps(record["adversarial"])):
        raise TrainingError(f"method: expected the constants of {folder / RECORD}, {settings.method} has others now")
    changed = [
        f"{name} {version} (was {began['versions'].get(name)})"
        for name, version in record["versions"].items()
        if began["versions"].get(name) != version
    ]
    return f"{', '.join(changed)}: losses may differ from those of an undisturbed run" if changed else None


def _read(path: Path) -> dict[str, Any]:
    return json_object(path, f"{path}: damaged")
