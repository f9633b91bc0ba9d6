"""Result files as the page takes them: read, checked against their form, and named by their machine."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .forms import FORMS, OLDER_STEP, FormError, check


class ReportError(ValueError):
    """A file that no page can be made from; the message names it and says what is expected."""


@dataclass(frozen=True)
class ResultFile:
    """What one benchmark wrote.

    Attributes:
        name: of the file, without its folder.
        kind: the benchmark, as the file has it.
        machine: facts of the machine.
        content: the whole file; steps of the older form as the present one has them.
        older: whether the file had the older form.
    """

    name: str
    kind: str
    machine: Mapping[str, Any]
    content: Mapping[str, Any]
    older: bool = False

    @property
    def results(self) -> Any:
        return self.content["results"]

    @property
    def place(self) -> str:
        """The GPU, or the CPU with its threads, in words."""
        machine = self.machine
        if machine.get("gpu"):
            return str(machine["gpu"].get("name", "GPU of unknown name"))
        threads = machine.get("threads")
        return f"{machine.get('cpu', 'machine of unknown name')}{f', {threads} threads' if threads else ''}"

    @property
    def commit(self) -> str:
        """Twelve digits, and whether files differed from it."""
        revision, _, changes = str(self.machine.get("commit", "unknown")).partition("+")
        return revision[:12] + (f"+{changes}" if changes else "")

    @property
    def date(self) -> str:
        return str(self.machine.get("date", "unknown date"))[:10]


def read(path: Path) -> ResultFile:
    """Read and check one file; a kind that the page does not know needs its kind only.

    Raises:
        ReportError: there is no such file, it is no JSON, or it is not what its benchmark writes.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: expected JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("benchmark"), str):
        raise ReportError(f"{path}: expected an object with the key 'benchmark', as the benchmarks write with --json")
    kind, machine = content["benchmark"], content.get("machine")
    if kind not in FORMS:
        return ResultFile(path.name, kind, machine if isinstance(machine, dict) else {}, content)
    if not isinstance(machine, dict) or not isinstance(machine.get("gpu") or {}, dict):
        raise ReportError(f"{path}: expected the facts of the machine as an object under 'machine'")
    older = kind == "step" and _is_older_step(content)
    try:
        check(content, OLDER_STEP if older else FORMS[kind], "")
    except FormError as error:
        raise ReportError(f"{path}: not a result file of the benchmark {kind!r}: {error}") from error
    if older:
        content = {**content, "results": [_present_step(row) for row in content["results"]]}
    return ResultFile(path.name, kind, machine, content, older)


def _is_older_step(content: Mapping[str, Any]) -> bool:
    rows = content.get("results")
    return isinstance(rows, list) and any(isinstance(row, dict) and "step" in row for row in rows)


def _present_step(row: Mapping[str, Any]) -> dict[str, Any]:
    missing = ("flop_bound", "of_bound", "model_share", "kernel_share", "launches", "not_run", "model", "peak_bytes")
    return {
        **dict.fromkeys(missing),
        **row,
        "provider": row["step"],
        "mode": "eager",
        "shape": f"{row['batch']} x {row['length']}",
    }
