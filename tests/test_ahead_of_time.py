"""Kernels compiled for GPUs that need not be there: none may spill a register.

In a process of its own: here the interpreter may have taken the place of the compiler.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("triton")
if not (ROOT / "benchmarks" / "resources.py").exists():
    pytest.skip("not a checkout", allow_module_level=True)

# Variants of ``benchmarks.resources`` that hold most registers of their kind, one for each kernel.
REPRESENTATIVE = {
    "noise_init normal bf16": 90,
    "projected_ascent l2 l2 token seed fp32": 80,
    "loss+gradients tile V=2048 symmetric_kl full fp32": 90,
    "loss+gradients stream kl full bf16": 100,
    "gradient V=4096 symmetric_kl full fp32": 90,
    "linear sum d symmetric_kl full stream fp32": 90,
}

COMPILE = """
import json, sys
from dataclasses import asdict
from benchmarks.resources import compile_triton, triton_variants
wanted = json.loads(sys.argv[1])
found = {variant.name: variant for variant in triton_variants()}
print(json.dumps([asdict(compile_triton(found[name], capability)) for name, capability in wanted.items()]))
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_representative_triton_kernels_do_not_spill():
    finished = run("-c", COMPILE, json.dumps(REPRESENTATIVE))
    assert finished.returncode == 0, finished.stderr[-2000:]
    usages = json.loads(finished.stdout.splitlines()[-1])
    assert len(usages) == len(REPRESENTATIVE)
    for usage, capability in zip(usages, REPRESENTATIVE.values(), strict=True):
        assert usage["architecture"].startswith(f"sm_{capability}")
        assert 16 <= usage["registers"] <= 255
        assert usage["spilt"] == 0, usage


@pytest.mark.slow
def test_no_kernel_spills(tmp_path):
    """Every Triton kernel for three architectures, and every CUDA kernel in the native module."""
    report = tmp_path / "resources.json"
    finished = run("-m", "benchmarks.resources", "--json", str(report))
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
    usages = json.loads(report.read_text())["results"]
    assert len(usages) > 100
    assert all(usage["spilt"] == 0 for usage in usages)
