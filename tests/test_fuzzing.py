"""A campaign of random calls, small enough for every run of the tests; and that a campaign finds what is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzzing.campaign import OPS, campaign, draw_case
from fuzzing.draws import same_bits

from alum_kernels.backends.native import load
from alum_kernels.backends.reference import projected_ascent as reference_ascent
from alum_kernels.backends.reference import symmetric_kl as reference_kl
from alum_kernels.ops.dispatch import BACKENDS

ROOT = Path(__file__).parents[1]
SEED, CASES, PARTS = 0, 1000, 10
needs_native = pytest.mark.skipif(load()[0] is None, reason=f"native module: {load()[1]}")


@pytest.mark.parametrize("part", range(PARTS))
def test_random_calls(part):
    share = CASES // PARTS
    report = campaign(SEED, range(part * share, (part + 1) * share), backends=BACKENDS)
    assert report.cases == share
    assert not report.failures, "\n".join(report.failures[:3])


def test_random_calls_of_the_emulated_cuda_kernels(cuda):
    from fuzzing.emulated_backend import emulation_of

    report = campaign(SEED, range(400), backends=("cuda",), emulation=emulation_of(cuda))
    assert sum(tally.cases for tally in report.tallies.values()) >= 15
    assert not report.failures, "\n".join(report.failures[:3])


@needs_native
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_random_calls_of_every_instruction_set(capability):
    """The program itself, on the kernels that are not this processor's first choice."""
    if load()[0].build_info()["cpu_capability"] == capability:
        pytest.skip("the calls above ran on it")
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.fuzzing", "--cases", "200", "--backends", "native"],
        cwd=ROOT, env={**os.environ, "ALUM_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    if f"this processor has no {capability}" in finished.stdout + finished.stderr:
        pytest.skip(f"this processor has no {capability}")
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-2000:]
    assert "200 cases of seed 0" in finished.stdout


def test_a_case_follows_from_its_numbers():
    for number in range(30):
        one, again = draw_case(3, number), draw_case(3, number)
        assert str(one) == str(again)
        assert str(one).startswith(f"--case 3:{number} ")
        for name, held in one.tensors.items():
            other = again.tensors[name]
            assert (held is None) == (other is None)
            assert held is None or same_bits(held.storage, other.storage)
    assert draw_case(3, 0, ops=tuple(op for op in OPS if op != draw_case(3, 0).op)) is None


def test_every_op_dtype_and_layout_is_drawn():
    cases = [draw_case(SEED, number) for number in range(CASES)]
    assert {case.op for case in cases} == set(OPS)
    tensors = [held for case in cases for held in case.tensors.values() if held is not None]
    assert {held.layout.split()[0] for held in tensors} == {
        "contiguous", "offset", "transposed", "stepped", "wide", "expanded"
    }  # fmt: skip
    assert {held.tensor.dtype for held in tensors} >= {
        torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.int64
    }  # fmt: skip
    assert any(held.tensor.numel() == 0 for held in tensors)
    assert any(held.tensor.isnan().any() for held in tensors)
    assert any((held.tensor == -torch.inf).any() for held in tensors)


def failing(ops: tuple[str, ...], backend: str, count: int = 60) -> list[str]:
    numbers = [n for n in range(600) if draw_case(SEED, n, ops) is not None][:count]
    return campaign(SEED, numbers, ops=ops, backends=(backend,)).failures


@needs_native
@pytest.mark.parametrize("element", ["first", "last"])
def test_one_wrong_element_of_a_kernel_is_found(monkeypatch, element):
    """A gradient kernel that errs in one element, as a wrong tail of a vector would."""
    from alum_kernels.backends.native import symmetric_kl as kernels

    right = kernels.gradient

    def wrong(a, b, statistics, grad_rows, grad_a, grad_b, *options):
        right(a, b, statistics, grad_rows, grad_a, grad_b, *options)
        if grad_a.numel():
            grad_a.view(-1)[0 if element == "first" else -1] *= 1.5

    assert not failing(("symmetric_kl",), "native")
    monkeypatch.setattr(kernels, "gradient", wrong)
    found = failing(("symmetric_kl",), "native")
    assert len(found) >= 5
    assert found[0].startswith(f"native: --case {SEED}:")
    assert "grad_a" in found[0]


@needs_native
def test_an_element_that_no_kernel_writes_is_found(monkeypatch):
    from alum_kernels.backends.native import noise_init as kernels

    right = kernels.noise_init

    def wrong(embeds, seed, std_per_token, std, mask, perturbed, delta, *options):
        scratch = torch.empty_like(perturbed)
        right(embeds, seed, std_per_token, std, mask, scratch, delta, *options)
        perturbed.view(-1)[1:] = scratch.view(-1)[1:]

    monkeypatch.setattr(kernels, "noise_init", wrong)
    assert failing(("noise_init",), "native")


def test_a_wrong_edge_and_an_input_that_is_written_are_found(monkeypatch):
    """Of the reference: a NaN row that is settled as zero, and a gradient that is cleaned in place."""
    right_loss, right_ascent = reference_kl.loss, reference_ascent.projected_ascent

    def settled(*arguments, **options):
        rows, statistics = right_loss(*arguments, **options)
        return (rows.nan_to_num(0.0) if rows.dtype == torch.float32 else rows), statistics

    def cleaning(embeds, grad, *arguments, **options):
        grad.nan_to_num_()
        return right_ascent(embeds, grad, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(reference_kl, "loss", settled)
        assert any("not finite" in text for text in failing(("symmetric_kl",), "reference"))
    monkeypatch.setattr(reference_ascent, "projected_ascent", cleaning)
    assert any("grad: the call wrote into it" in text for text in failing(("projected_ascent",), "reference"))


def test_a_result_that_changes_from_call_to_call_is_found(monkeypatch):
    right, calls = reference_ascent.projected_ascent, []

    def drifting(*arguments, **options):
        calls.append(None)
        perturbed, *rest = right(*arguments, **options)
        return perturbed * (1 + 2.0**-20 * (len(calls) % 2)), *rest

    monkeypatch.setattr(reference_ascent, "projected_ascent", drifting)
    assert any("other bits" in text for text in failing(("projected_ascent",), "reference", 20))


def test_what_is_raised_is_a_failure(monkeypatch):
    def raising(*arguments, **options):
        raise RuntimeError("out of order")

    monkeypatch.setattr(reference_kl, "loss", raising)
    found = failing(("kl",), "reference", 3)
    assert len(found) == 3
    assert "RuntimeError: out of order" in found[0]
