"""Checkpoints of a run: a folder each, ``checkpoint-N`` after N optimizer steps, whole or not there.

A folder has the model as ``from_pretrained`` reads it, the state of the training (``state_files.py``) and
``manifest.json``, with the size and SHA-256 of every other file.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alum_kernels.training import atomic
from alum_kernels.training.errors import TrainingError
from alum_kernels.training.state_files import read_state, write_state

PREFIX = "checkpoint-"
MANIFEST = "manifest.json"
READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Checkpoint:
    """One that is whole."""

    folder: Path
    step: int

    def state(self) -> Any:
        """What :meth:`Checkpoints.write` was given."""
        return read_state(self.folder)


class Checkpoints:
    """Those of one run.

    Args:
        folder: of the run; it exists.
        keep: so many of them, the newest, stay.
        say: tells a person a line.
    """

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None]) -> None:
        self._folder, self._keep, self._say = folder, keep, say

    def write(self, step: int, write_model: Callable[[Path], None], state: Any) -> Path:
        """Write one, and remove what is older than the last ``keep``.

        Args:
            step: optimizer steps made.
            write_model: writes the model's files into a folder.
            state: of the rest, as :func:`~alum_kernels.training.state_files.write_state` takes it.

        Raises:
            WriteError: a file cannot be written.
        """
        path = self._folder / f"{PREFIX}{step}"
        with atomic.writing(path):
            partial = atomic.begin_folder(path)
            write_model(partial)
            write_state(partial, state)
            files = {file.name: _facts(file) for file in sorted(partial.iterdir())}
            (partial / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1) + "\n")
            atomic.finish_folder(partial, path)
            for old in self._steps()[self._keep :]:
                atomic.remove_folder(self._folder / f"{PREFIX}{old}")
        return path

    def newest(self) -> Checkpoint | None:
        """The newest one that is whole, None where there is none at all. Each damaged one before it is said.

        Raises:
            TrainingError: every one is damaged.
        """
        damages = []
        for step in self._steps():
            folder = self._folder / f"{PREFIX}{step}"
            damage = _damage(folder, step)
            if damage is None:
                for line in damages:
                    self._say(f"{line}; going back to {folder.name}")
                return Checkpoint(folder, step)
            damages.append(damage)
        if damages:
            raise TrainingError(f"{damages[0]}; there is no other checkpoint to go back to")
        return None

    def _steps(self) -> list[int]:
        """Of the folders called as checkpoints, the newest first."""
        names = (path.name.removeprefix(PREFIX) for path in self._folder.glob(f"{PREFIX}*"))
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def _facts(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(READ_BYTES):
            digest.update(part)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _damage(folder: Path, step: int) -> str | None:
    """What is wrong with a checkpoint, by the file that is at fault, or None."""
    manifest = folder / MANIFEST
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        expected = dict(content["files"])
        recorded = content["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{manifest}: damaged: {error}"
    if recorded != step:
        return f"{manifest}: damaged: expected step {step}, got {recorded}"
    for name, facts in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{file}: damaged: the file is missing"
        found = _facts(file)
        if found != facts:
            return f"{file}: damaged: expected {facts['bytes']} bytes as the manifest says, got " + (
                f"{found['bytes']}" if found["bytes"] != facts["bytes"] else "as many others"
            )
    return None
