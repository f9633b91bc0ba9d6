"""The log of a run: a JSON object a line, of steps and of evaluations.

A run that goes on from a checkpoint takes the lines back that were written after it, so that every step is there once.
"""

import json
from pathlib import Path
from typing import Any

from alum_kernels.training import atomic
from alum_kernels.training.errors import TrainingError

NAME = "log.jsonl"


class Journal:
    """Appends lines to the log of a run.

    Args:
        folder: of the run.
        step: the step that it goes on after; lines of later ones, and one half written, are removed.

    Raises:
        TrainingError: what is there is no log.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / NAME
        lines = _whole_lines(self.path)
        kept = [line for number, line in enumerate(lines, 1) if _step_of(line, self.path, number) <= step]
        atomic.write_text(self.path, "".join(line + "\n" for line in kept))
        self._stream = self.path.open("a", encoding="utf-8")

    def write(self, entry: dict[str, Any]) -> None:
        """One line; it survives the end of the process from here on. Raises WriteError where it cannot be written."""
        with atomic.writing(self.path):
            self._stream.write(json.dumps(entry) + "\n")
            self._stream.flush()

    def sync(self) -> None:
        """Bring the lines to the disk."""
        with atomic.writing(self.path):
            atomic.sync(self.path)

    def close(self) -> None:
        """Raises WriteError where a line that could not be written still cannot."""
        with atomic.writing(self.path):
            self._stream.close()


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in _whole_lines(folder / NAME)]


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: damaged: {error}") from error
    return [line[:-1] for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _step_of(line: str, path: Path, number: int) -> int:
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        step = None
    if not isinstance(step, int):
        raise TrainingError(
            f"{path}:{number}: damaged: expected an object with a step; without that file the run goes on"
        )
    return step
