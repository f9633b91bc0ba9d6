"""What is installed, which backend serves which op here, and why the others do not."""

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch

import alum_kernels
from alum_kernels.backends import native
from alum_kernels.backends import triton as triton_backend
from alum_kernels.ops.dispatch import BACKENDS, choose, unavailable

OPS = (
    ("noise_init", "noise_init", None),
    ("projected_ascent", "projected_ascent", None),
    ("symmetric_kl", "symmetric_kl", None),
    ("symmetric_kl_grad", "symmetric_kl", None),
    ("kl", "symmetric_kl", "kl"),
    ("js", "symmetric_kl", "js"),
    ("squared_hellinger", "symmetric_kl", "squared_hellinger"),
    ("linear_symmetric_kl", "linear_symmetric_kl", None),
    ("linear_kl", "linear_symmetric_kl", "kl"),
)
"""Public function, the op behind it, and its divergence."""

PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets")


def version_of(package: str) -> str:
    """The installed version, or ``not installed``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[torch.device]:
    """The CPU and every CUDA device."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def describe(device: torch.device) -> str:
    if device.type == "cpu":
        module, _ = native.load()
        capability = f", kernels for {module.build_info()['cpu_capability']}" if module else ""
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads{capability}"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB"
    )


def service(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, str]]:
    """For each public function, what each backend says there: ``default``, ``yes`` or the reason why not."""
    rows: dict[str, dict[str, str]] = {}
    probe = torch.empty(0, dtype=dtype, device=device)
    for function, op, divergence in OPS:
        default = choose(op, None, probe, divergence)
        rows[function] = {
            backend: "default" if backend == default else unavailable(op, backend, device, dtype, divergence) or "yes"
            for backend in BACKENDS
        }
    return rows


def report() -> dict[str, Any]:
    """Everything that is printed, as plain data."""
    module, reason = native.load()
    return {
        "alum_kernels": alum_kernels.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: version_of(package) for package in PACKAGES},
        "torch_cuda": torch.version.cuda,
        "native": module.build_info() if module else reason,
        "triton": "interpreter" if triton_backend.interpreted() else "compiled",
        "devices": {str(device): {"is": describe(device), "ops": service(device)} for device in devices()},
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """The report as text."""
    built = facts["native"]
    out = [
        f"alum_kernels {facts['alum_kernels']}, Python {facts['python']}, {facts['platform']}",
        "packages      " + ", ".join(f"{name} {version}" for name, version in facts["packages"].items()),
        f"torch CUDA    {facts['torch_cuda'] or 'none (CPU build)'}",
    ]
    if isinstance(built, str):
        out.append(f"native module {built}")
    else:
        cuda = (
            f"{built['cuda_compiler']} for {', '.join(built['cuda_architectures'])}"
            if built["cuda_architectures"]
            else "without CUDA"
        )
        out.append(f"native module {built['compiler']}, {cuda}, built with torch {built['torch_built_with']}")
    out.append(f"triton        {facts['triton']}")
    for name, device in facts["devices"].items():
        out += ["", f"{name}: {device['is']}", f"  {'':20}" + "".join(f"{backend:12}" for backend in BACKENDS)]
        reasons: dict[str, str] = {}
        for function, served in device["ops"].items():
            cells = []
            for backend, answer in served.items():
                if answer in ("default", "yes"):
                    cells.append(answer)
                else:
                    mark = reasons.setdefault(f"{backend}: {answer}", f"no ({len(reasons) + 1})")
                    cells.append(mark)
            out.append(f"  {function:20}" + "".join(f"{cell:12}" for cell in cells))
        out += [f"  ({number}) {reason}" for number, reason in enumerate(reasons, 1)]
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the report."""
    facts = report()
    print(json.dumps(facts, indent=2) if arguments.json else "\n".join(lines(facts)))
    return 0
