"""The op benchmarks under pytest-benchmark, on small shapes, one group a case.

    pytest benchmarks/ --benchmark-only

The providers are those of ``python -m benchmarks.ops``, whose figures are the ones to quote: there rounds are
interleaved, caches are cold on a GPU and freeing what a call returned is not timed. Here it is. torch.compile joins
with ``ALUM_BENCHMARK_COMPILE=1``.
"""

import os

import pytest
import torch

from .cases import QUICK_ASCENTS, ascent_cases, divergence_cases, noise_cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMPILED = os.environ.get("ALUM_BENCHMARK_COMPILE") == "1"
PROVIDERS = [
    "eager",
    *(["compile"] if COMPILED else []),
    *(["liger", "triton"] if DEVICE.type == "cuda" else []),
    "native",
]
EMBEDDINGS = (4, 64, 768)

CASES = [
    *divergence_cases(((32, 30522, "fp32"), (32, 30522, "bf16"), (4096, 3, "fp32")), DEVICE, COMPILED),
    *noise_cases(EMBEDDINGS, DEVICE, COMPILED),
    *ascent_cases(EMBEDDINGS, DEVICE, QUICK_ASCENTS, COMPILED),
]


def tensors_of(returned: object) -> list[torch.Tensor]:
    """Tensors in nested tuples."""
    if isinstance(returned, torch.Tensor):
        return [returned]
    return [tensor for part in returned for tensor in tensors_of(part)]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.label}")
def test_op(benchmark, case, provider):
    torch._dynamo.reset()
    calls = case.build()
    if provider not in calls:
        pytest.skip(f"{provider} has no {case.op} here")
    call = calls[provider]

    def finished() -> object:
        result = call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)
        return result

    benchmark.group = f"{case.op} {case.label}"
    benchmark.extra_info.update(provider=provider, bytes_moved=case.bytes_moved, threads=torch.get_num_threads())
    returned = benchmark.pedantic(finished, rounds=20, warmup_rounds=2)
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(returned))
