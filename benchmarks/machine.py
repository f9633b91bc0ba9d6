"""Where a figure was measured: facts about the machine, written into every result file beside the measurements."""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from alum_kernels.backends import native

from .checkout import ROOT, is_checkout

PACKAGES = (
    "alum-kernels", "torch", "triton", "transformers", "liger-kernel", "smart-pytorch", "numpy",
    "scikit-learn", "scipy", "seqeval",
)  # fmt: skip


def cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    """What a program prints, or None where there is no such program or it fails."""
    if shutil.which(command[0]) is None:
        return None
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return ran.stdout.strip() if ran.returncode == 0 else None


def commit() -> str:
    """Hash of the checkout, ``+changes`` where files differ from it; ``unknown`` without git and where installed."""
    found = _output("git", "rev-parse", "HEAD") if is_checkout() else None
    if not found:
        return "unknown"
    return f"{found}+changes" if _output("git", "status", "--porcelain", "--untracked-files=no") else found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu_facts() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
    }


CLOCKS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "max_sm_mhz": "clocks.max.sm",
    "max_memory_mhz": "clocks.max.mem",
    "power_limit_w": "power.limit",
}
"""Names in a result file, and what nvidia-smi calls them."""


def _number(text: str) -> float | None:
    """None for what nvidia-smi says in place of a figure that the device does not give."""
    try:
        return float(text)
    except ValueError:
        return None


def _gpu_clocks() -> dict[str, float | None]:
    """Clocks as they are now and at most, and the power limit, of the current device; None where unknown."""
    device = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    query = f"--query-gpu={','.join(CLOCKS.values())}"
    answer = _output("nvidia-smi", f"--id={device}", query, "--format=csv,noheader,nounits")
    figures = [_number(text) for text in answer.split(",")] if answer else [None] * len(CLOCKS)
    return dict(zip(CLOCKS, figures, strict=True))


def facts(device: torch.device) -> dict[str, Any]:
    """Facts of the machine as JSON has them; ``load_average`` tells whether something else was running."""
    module, reason = native.load()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device.type,
        "cpu": cpu_model(),
        "logical_cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "native": reason if module is None else module.build_info(),
        "gpu": _gpu_facts() if device.type == "cuda" else None,
        "gpu_clocks": _gpu_clocks() if device.type == "cuda" else None,
    }


def describe(known: dict[str, Any]) -> str:
    """One line for the head of a table."""
    place = known["gpu"]["name"] if known["gpu"] else f"{known['cpu']}, {known['threads']} threads"
    packages = known["packages"]
    revision, _, changes = known["commit"].partition("+")
    short = revision[:12] + (f"+{changes}" if changes else "")
    return (
        f"{place}; torch {packages['torch']}, triton {packages['triton']}; load {known['load_average']}; commit {short}"
    )


def machine_of(options: argparse.Namespace) -> tuple[torch.device, dict[str, Any]]:
    """The device of a measurement and :func:`facts` of it, with as many threads as asked for; prints what it is.

    Args:
        options: of :func:`benchmarks.machine_options.add_machine_options`.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    known = facts(device)
    print(describe(known))
    return device, known


def slug(known: dict[str, Any]) -> str:
    """The machine in a file name: of the GPU, or of the CPU and the number of threads."""
    name = known["gpu"]["name"] if known["gpu"] else f"{known['cpu']} {known['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def result_path(path: Path, what: str, known: dict[str, Any]) -> Path:
    """The file itself, or ``<machine>-<what>.json`` in a folder (one that exists, or a path without a suffix)."""
    return path / f"{slug(known)}-{what}.json" if path.is_dir() or not path.suffix else path


def write_results(path: Path, what: str, known: dict[str, Any], **content: Any) -> Path:
    """Write one measurement as JSON.

    Args:
        path: a file, or a folder; see :func:`result_path`.
        what: ``ops``, ``accuracy``, ``step``, ``pass-costs``, ``flops``, ``memory``, ``estimators``, ``growth``,
            ``linear-head``, ``gpu-check`` or ``resources``.
        known: of :func:`facts`, taken when the measurement began.
        content: the measurements.

    Returns:
        The file.
    """
    path = result_path(path, what, known)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": what, "machine": known, **content}, indent=1) + "\n")
    print(f"written: {path}")
    return path
