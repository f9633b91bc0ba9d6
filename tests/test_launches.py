"""How many kernels a call launches on a GPU."""

import oracle
import pytest
import torch

from alum_kernels import noise_init, projected_ascent, symmetric_kl, symmetric_kl_grad
from alum_kernels.ops.dispatch import implementation

pytestmark = pytest.mark.gpu


def launches(run) -> list[str]:
    """Names of the kernels that ``run`` launches, after a first call that compiles what there is to compile."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        run()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in names if not name.startswith(("Memcpy", "Memset"))]


@pytest.fixture(params=["native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _memory_as_it_comes() -> None:
    """Poisoning launches kernels of its own."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def embeds() -> torch.Tensor:
    return torch.randn(4, 64, 768, device="cuda", dtype=torch.bfloat16)


def test_noise_init(backend, embeds):
    seed = torch.tensor([1], device="cuda")
    mask = torch.ones(4, 64, dtype=torch.int64, device="cuda")
    names = launches(lambda: noise_init(embeds, seed=seed, mask=mask, return_delta=True, backend=backend))
    assert len(names) == 1, names


@pytest.mark.parametrize("level", ["token", "sequence", "batch"])
@pytest.mark.parametrize(("norm", "normalize"), [("linf", "none"), ("linf", "linf"), ("l2", "l2")])
def test_projected_ascent(backend, embeds, norm, normalize, level):
    seed = torch.tensor([1], device="cuda")
    grad = torch.randn_like(embeds)
    options = {"norm": norm, "normalize": normalize, "level": level, "return_stats": True, "backend": backend}
    names = launches(lambda: projected_ascent(embeds, grad, seed=seed, step_size=1e-3, epsilon=1e-3, **options))
    assert len(names) <= (2 if level == "batch" or (level == "sequence" and backend == "triton") else 1), names


@pytest.mark.parametrize("columns", [3, 64, 1000, 30522, 128256])
def test_symmetric_kl(backend, columns):
    a, b = (t.requires_grad_() for t in oracle.logit_pair(16, columns, 1e-3, device="cuda", dtype=torch.bfloat16))
    upstream = torch.ones(16, device="cuda")
    rows = symmetric_kl(a, b, reduction="none", backend=backend)
    names = launches(lambda: symmetric_kl(a, b, reduction="none", backend=backend))
    assert len(names) == 1, names
    names = launches(lambda: torch.autograd.grad(rows, (a, b), upstream, retain_graph=True))
    assert len(names) == 1, names
    names = launches(lambda: symmetric_kl_grad(a, b, reduction="none", backend=backend))
    assert len(names) == 1, names
    names = launches(lambda: symmetric_kl_grad(a, b, reduction="none", clean_gradient=True, backend=backend))
    assert len(names) == 1, names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [30522, 128256])
def test_rows_of_a_linear_head(backend, columns, dtype):
    kernel = implementation("linear_symmetric_kl", backend)
    logits = torch.randn(2, 1, 16, columns, device="cuda")
    rows, grads = torch.empty(1, 16, device="cuda"), torch.empty(2, 1, 16, columns, device="cuda", dtype=dtype)
    options = (True, "symmetric_kl", "full", 1.0)
    names = launches(lambda: kernel.divergence_rows(*logits, None, None, rows, *grads, *options))
    assert len(names) == 1, names
