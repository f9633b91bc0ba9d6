"""What was built, what it says about itself, and that every instruction set computes the same."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch

import alum_kernels
from alum_kernels import noise_init, projected_ascent, symmetric_kl, symmetric_kl_grad
from alum_kernels.backends import native

MODULE, REASON = native.load()
needs_native = pytest.mark.skipif(MODULE is None, reason=f"native module: {REASON}")

if os.environ.get("ALUM_EXPECT_NATIVE") == "1":

    def test_native_module_was_expected():
        assert MODULE is not None, REASON


if os.environ.get("ALUM_EXPECT_CUDA") == "1":

    def test_cuda_kernels_were_expected():
        assert MODULE is not None, REASON
        assert MODULE.build_info()["cuda_architectures"]


def test_record_of_the_build_tells_what_is_there():
    if not native.BUILD_RECORD.exists():
        pytest.skip("run from a checkout that was not installed")
    record = json.loads(native.BUILD_RECORD.read_text())["native"]
    assert record == "built" or record.startswith("skipped: ")
    if record.startswith("skipped"):
        assert MODULE is None
        assert record in REASON
    else:
        assert MODULE is not None, REASON


def test_missing_module_says_why(monkeypatch, tmp_path):
    """The reason that is recorded at installation is the one that a call gets."""
    record = tmp_path / "_build.json"
    record.write_text(json.dumps({"native": "skipped: no C++ compiler was found"}))

    def no_module(name: str):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(native, "BUILD_RECORD", record)
    monkeypatch.setattr(native.importlib, "import_module", no_module)
    assert native.load.__wrapped__() == (None, "not built: skipped: no C++ compiler was found")
    record.write_text(json.dumps({"native": "built"}))
    module, reason = native.load.__wrapped__()
    assert module is None
    assert reason == "does not load: No module named 'alum_kernels._C'"


@needs_native
def test_build_facts():
    facts = MODULE.build_info()
    version = (Path(__file__).parents[1] / "VERSION").read_text().strip()
    assert facts["version"] == alum_kernels.__version__ == version
    assert re.search(r"\d+\.\d+", facts["compiler"])
    assert facts["cpu_capability"] in ("baseline", "avx2", "avx512")
    assert all(re.fullmatch(r"\d+[af]?", name) for name in facts["cuda_architectures"])
    assert isinstance(facts["cuda_stream_resolved"], bool)
    if facts["cuda_architectures"]:
        assert "." in facts["cuda_compiler"]
    if torch.version.cuda is not None and facts["cuda_architectures"]:
        assert facts["cuda_stream_resolved"]
    built_for, running = facts["torch_target"], torch.__version__
    assert [int(n) for n in re.findall(r"\d+", running)[:2]] >= [int(n) for n in re.findall(r"\d+", built_for)[:2]]


COMPUTE = """
import sys, torch
from alum_kernels import noise_init, projected_ascent, symmetric_kl_grad
from alum_kernels.backends.native import load
given = torch.load(sys.argv[1])
results = {"capability": load()[0].build_info()["cpu_capability"]}
for columns, (a, b) in given["logits"].items():
    results[columns] = symmetric_kl_grad(a, b, reduction="none", backend="native")
embeds, grad = given["embeds"]
results["noise"] = noise_init(embeds, std=1.0, seed=1, backend="native")
results["ascent"] = projected_ascent(
    embeds, grad, seed=1, std=1.0, step_size=1.0, epsilon=2.0, norm="l2", normalize="l2", level="sequence",
    backend="native")
torch.save(results, sys.argv[2])
"""


@needs_native
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_computes_the_same(capability, tmp_path):
    logits = {columns: oracle.logit_pair(33, columns, 1e-3) for columns in (3, 64, 65, 1000)}
    embeds = torch.randn(3, 5, 33, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(3, 5, 33, generator=torch.Generator().manual_seed(1))
    torch.save({"logits": logits, "embeds": (embeds, grad)}, tmp_path / "given.pt")
    finished = subprocess.run(
        [sys.executable, "-c", COMPUTE, tmp_path / "given.pt", tmp_path / "results.pt"],
        env={**os.environ, "ALUM_CPU_CAPABILITY": capability}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if f"this processor has no {capability}" in finished.stderr:
        pytest.skip(f"this processor has no {capability}")
    assert finished.returncode == 0, finished.stderr[-2000:]
    results = torch.load(tmp_path / "results.pt")
    assert results["capability"] == capability
    for columns, (a, b) in logits.items():
        rows, gradient = results[columns]
        assert oracle.relative_error(rows, oracle.divergence("symmetric_kl", a, b)) <= (4e-6 if columns <= 64 else 1e-6)
        assert oracle.gradient_errors(gradient, oracle.divergence_gradient("symmetric_kl", a, b)[0])[0] <= 1e-5
        torch.testing.assert_close(
            symmetric_kl_grad(a, b, reduction="none", backend="native")[0], rows, rtol=2e-6, atol=0
        )
    noise = oracle.unit_noise((3, 5, 33), 1)
    assert (results["noise"].double() - (embeds.double() + noise)).abs().max() <= 1.5e-6
    options = {"norm": "l2", "normalize": "l2", "level": "sequence"}
    here = projected_ascent(embeds, grad, seed=1, std=1.0, step_size=1.0, epsilon=2.0, backend="native", **options)
    torch.testing.assert_close(results["ascent"], here, rtol=1e-6, atol=1e-6)
    want, _ = oracle.ascend(grad, noise, step_size=1.0, epsilon=2.0, **options)
    assert (results["ascent"].double() - (embeds.double() + want)).abs().max() <= 1.5e-6


@needs_native
def test_unknown_instruction_set_is_refused():
    finished = subprocess.run(
        [sys.executable, "-c", "import torch, alum_kernels._C as c; c.build_info()"],
        env={**os.environ, "ALUM_CPU_CAPABILITY": "mmx"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode != 0
    assert "ALUM_CPU_CAPABILITY: expected baseline, avx2 or avx512, got mmx" in finished.stderr


@needs_native
def test_ops_are_where_torch_looks_for_them():
    a, b = oracle.logit_pair(4, 5, 0.1)
    assert torch.equal(symmetric_kl(a, b, backend="native"), symmetric_kl(a, b))
    assert torch.equal(
        noise_init(torch.zeros(1, 2, 3), seed=1), noise_init(torch.zeros(1, 2, 3), seed=1, backend="native")
    )
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "alum_kernels_native::" in name
    }
    assert registered == {
        "noise_init", "projected_ascent", "symmetric_kl_loss", "symmetric_kl_gradient",
        "symmetric_kl_loss_and_gradient", "linear_divergence",
    }  # fmt: skip
