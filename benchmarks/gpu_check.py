"""``make gpu-check``: everything that only a CUDA machine can show, in one command and one result file.

    build        the native module for the architecture that is there
    tests        the whole suite on CUDA, native and compiled Triton
    sanitizer    memcheck, racecheck and initcheck of compute-sanitizer over a small run of every native kernel
    benchmark    the ops against eager PyTorch and torch.compile
    linear       the divergence of a linear head: accuracy, time and memory beside eager PyTorch and Liger-Kernel
    step         whole training steps of BERT-base (masked LM, 32 x 512) and RoBERTa-large (16 x 128), few rounds

Runs on the tree as it lies, with the interpreter that starts it: no git, no network, no virtual environment. Every
stage is run even where one before it failed; the exit status is 1 if any failed. A tool that the machine does not
have or that refuses the device is reported as not run, with the reason, never as passed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .checkout import ROOT, is_checkout
from .machine import facts, write_results

RESULTS = ROOT / "benchmarks" / "results"
SANITIZERS = ("memcheck", "racecheck", "initcheck")
REFUSALS = ("Device not supported", "No attachable process", "Unable to find injection library", "LibraryNotLoaded")
"""How compute-sanitizer says that it cannot work on this machine at all."""


LINEAR_HEADS = ((768, 30522), (4096, 128256))
"""Hidden size and vocabulary: BERT's, and that of a large decoder."""

STEPS = {
    "bert-base-mlm-32x512": ("standard", "naive", "ours"),
    "roberta-large-cls-16x128": ("standard", "naive", "ours", "ours, captured", "ours, rho 0.25"),
}
"""Whole-step shapes and who takes them. About half a minute each, most of it for starting and making the model."""


@dataclass(frozen=True)
class Stage:
    """What one command showed: ``passed``, ``failed`` or ``not run``."""

    name: str
    outcome: str
    seconds: float
    detail: str


def run(name: str, command: list[str], *, limit: float, refusals: tuple[str, ...] = (), **environment: str) -> Stage:
    """Run one stage from the root of the tree, its output shown as it comes; a refusal in it means "not run"."""
    print(f"\n=== {name}: {' '.join(command)}", flush=True)
    started = time.perf_counter()
    lines: list[str] = []
    process = subprocess.Popen(
        ["timeout", str(limit), *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    status = process.wait()
    tail = "\n".join(lines[-15:])
    if status == 124:
        tail = f"stopped after {limit:.0f} s\n{tail}"
    refused = [line for line in lines if any(refusal in line for refusal in refusals)]
    outcome = "passed" if status == 0 else "not run" if refused else "failed"
    return Stage(name, outcome, time.perf_counter() - started, "\n".join([*refused[:1], tail]))


def build() -> Stage:
    major, minor = torch.cuda.get_device_capability()
    architecture = "90a" if (major, minor) == (9, 0) else "100f" if major == 10 else f"{major}{minor}"
    return run(
        "build",
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        limit=300,
        ALUM_NATIVE="1",
        ALUM_CUDA="1",
        ALUM_CUDA_ARCHITECTURES=architecture,
        ALUM_WERROR="1",
    )


def stream() -> Stage:
    """Without torch's stream no CUDA kernel of the module can be launched."""
    check = (
        "from alum_kernels.backends import native; module, why = native.load(); assert module, why; "
        "facts = module.build_info(); print(facts); assert facts['cuda_stream_resolved']"
    )
    return run("stream", [sys.executable, "-c", check], limit=60)


def sanitize(tool: str) -> Stage:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        return Stage(tool, "not run", 0.0, "compute-sanitizer is not on the PATH")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, "-m", "benchmarks.every_kernel"]
    return run(tool, command, limit=120, refusals=REFUSALS, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def whole_step(shape: str, providers: tuple[str, ...], output: Path, machine: str) -> Stage:
    target = output / f"{machine}-step-{shape}.json"
    command = [sys.executable, "-m", "benchmarks.step", "--device", "cuda", "--shape", shape, "--json", str(target)]
    return run(f"step {shape}", [*command, "--rounds", "5", "--providers", *providers], limit=120)


def main() -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("--skip", nargs="*", default=[], choices=["build", "tests", "sanitizer", "benchmark"])
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of the result files (default: %(default)s)"
    )
    chosen = parser.parse_args()

    if not is_checkout():
        print("gpu-check: it builds and tests the sources: run make gpu-check in a checkout", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device here (torch.cuda.is_available() is false)", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    stages: list[Stage] = []
    if "build" not in chosen.skip:
        stages.append(build())
    stages += [stream(), run("backends", [sys.executable, "-m", "alum_kernels"], limit=60)]
    if "tests" not in chosen.skip:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "tests",
            "-q",
            "-m",
            "not slow",
            "--maxfail=30",
            "-p",
            "no:cacheprovider",
        ]
        stages.append(run("tests", command, limit=400, ALUM_EXPECT_NATIVE="1", ALUM_EXPECT_CUDA="1"))
    if "sanitizer" not in chosen.skip:
        stages += [sanitize(tool) for tool in SANITIZERS]
    if "benchmark" not in chosen.skip:
        target = chosen.output / f"{name}-ops.json"
        command = [sys.executable, "-m", "benchmarks.ops", "--device", "cuda", "--json", str(target)]
        stages.append(run("benchmark", command, limit=240))
        for hidden, vocabulary in LINEAR_HEADS:
            target = chosen.output / f"{name}-linear-head-{hidden}.json"
            sizes = ["--rows", "8192", "--hidden", str(hidden), "--vocabulary", str(vocabulary), "--rounds", "7"]
            command = [
                sys.executable,
                "-m",
                "benchmarks.linear_head",
                "--device",
                "cuda",
                "--json",
                str(target),
                *sizes,
            ]
            stages.append(run(f"linear {hidden}", command, limit=120))
        stages += [whole_step(shape, providers, chosen.output, name) for shape, providers in STEPS.items()]

    machine = facts(torch.device("cuda"))
    write_results(
        chosen.output / f"{name}-check.json", "gpu-check", machine, stages=[asdict(stage) for stage in stages]
    )
    print("\n" + "\n".join(f"{stage.name:30} {stage.outcome:8} {stage.seconds:6.1f} s" for stage in stages))
    return 1 if any(stage.outcome == "failed" for stage in stages) else 0


if __name__ == "__main__":
    sys.exit(main())
