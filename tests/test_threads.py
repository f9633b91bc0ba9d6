"""Calls from many threads at once: the same bits as one after another, and one native module.

The ops release the GIL within torch, so that the calls do overlap. Each thread has tensors of its own and reads some
that all of them share. (Triton's interpreter serves one thread: it replaces parts of the language while a kernel runs.)
"""

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import oracle
import pytest
import torch
from fuzzing.draws import same_bits
from linear_operands import operands
from torch import Tensor

from alum_kernels import (
    kl,
    linear_products,
    linear_symmetric_kl,
    linear_symmetric_kl_grad,
    noise_init,
    projected_ascent,
    symmetric_kl,
    symmetric_kl_grad,
)
from alum_kernels.backends import native

THREADS = 8
ROUNDS = {"reference": 1, "native": 3}
Call = Callable[[], list[Tensor]]

needs_native = pytest.mark.skipif(native.load()[0] is None, reason=f"native module: {native.load()[1]}")


def at_once(calls: list[Call]) -> list[list[Tensor]]:
    """The results of the calls, each in a thread of its own, begun together."""
    barrier = threading.Barrier(len(calls))

    def begin(call: Call) -> list[Tensor]:
        barrier.wait(timeout=60)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(begin, call) for call in calls]]


def assert_same_as_serial(place, calls: list[Call]) -> None:
    serial = [call() for call in calls]
    assert any(not same_bits(x, y) for one in serial[1:] for x, y in zip(one, serial[0], strict=False))
    for _ in range(ROUNDS[place.backend]):
        for number, (got, want) in enumerate(zip(at_once(calls), serial, strict=True)):
            for x, y in zip(got, want, strict=True):
                assert same_bits(x, y), f"thread {number}"


def divergence_calls(device: str, backend: str, columns: int, rows: int) -> list[Call]:
    """Forward and backward against clean logits, and a mask, that all threads share."""
    _, clean = oracle.logit_pair(rows, columns, 0.0, device=device)
    mask = torch.arange(rows, device=device) % 3 != 1

    def call(number: int) -> list[Tensor]:
        changed = oracle.logit_pair(rows, columns, 0.1 * (1 + number), device=device, seed=1 + number)[0]
        adv = changed.requires_grad_()
        function = (symmetric_kl, kl)[number % 2]
        loss = function(adv, clean, mask=mask, temperature=1 + number / 8, backend=backend)
        (grad,) = torch.autograd.grad(loss, adv)
        at_once_loss, at_once_grad = symmetric_kl_grad(adv, clean, mask=mask, backend=backend)
        return [loss.detach(), grad, at_once_loss, at_once_grad]

    return [lambda number=number: call(number) for number in range(THREADS)]


@pytest.mark.parametrize(("columns", "rows"), [(5, 1500), (64, 300), (1000, 30), (9000, 4)])
def test_divergences(compiled_place, columns, rows):
    assert_same_as_serial(
        compiled_place, divergence_calls(compiled_place.device, compiled_place.backend, columns, rows)
    )


@pytest.mark.parametrize("level", ["token", "sequence", "batch"])
def test_noise_and_ascent(compiled_place, level):
    """One set of embeddings under every thread, with a seed of its own: noise, a step, and the gradient behind it."""
    shape, device, backend = (4, 31, 300), compiled_place.device, compiled_place.backend
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(shape, generator=generator).to(device)
    mask = (torch.rand(shape[:2], generator=generator) < 0.8).to(device)

    def call(number: int) -> list[Tensor]:
        leaf = embeds.detach().requires_grad_()
        noise = {"seed": number, "std": 0.1, "mask": mask, "backend": backend}
        perturbed = noise_init(leaf, **noise)
        (grad,) = torch.autograd.grad((perturbed**3).sum(), leaf)
        options = {"norm": "l2", "normalize": "l2", "level": level, "step_size": 0.3, "epsilon": 0.2}
        moved, delta, stats = projected_ascent(leaf, grad, return_delta=True, return_stats=True, **noise, **options)
        (through,) = torch.autograd.grad(moved.square().sum(), leaf)
        return [perturbed.detach(), grad, moved.detach(), delta, stats, through]

    assert_same_as_serial(compiled_place, [lambda number=number: call(number) for number in range(THREADS)])


def test_linear_heads_with_budgets_of_their_own(compiled_place):
    """Chunks of one row, of some, and all at once, over a weight that all threads share and differentiate."""
    backend = compiled_place.backend
    given = operands(40, 33, 257, device=compiled_place.device)
    weight, bias = given["weight"].requires_grad_(), given["bias"].requires_grad_()
    budgets = (1, 8 * 257 * 7, None, 8 * 257 * 16)

    def call(number: int) -> list[Tensor]:
        own = operands(40, 33, 257, 0.1 * (1 + number), device=compiled_place.device, seed=number)
        adv_hidden, hidden = own["adv_hidden"].requires_grad_(), own["hidden"].requires_grad_()
        options = {"chunk_bytes": budgets[number % 4], "backend": backend}
        loss = linear_symmetric_kl(adv_hidden, hidden, weight, bias, **options)
        grads = torch.autograd.grad(loss, (adv_hidden, hidden, weight, bias))
        products = linear_products(hidden, weight)
        of_ascent = linear_symmetric_kl_grad(adv_hidden, hidden, weight, bias, clean_products=products, **options)
        return [loss.detach(), *grads, *of_ascent]

    assert_same_as_serial(compiled_place, [lambda number=number: call(number) for number in range(THREADS)])


def test_backends_at_once_beside_other_work():
    """Reference and native calls, while other threads keep torch's own reductions going."""
    backends = ["reference"] + ["native"] * (native.load()[0] is not None)
    calls = [divergence_calls("cpu", backend, 300, 100)[n] for backend in backends for n in range(THREADS // 2)]
    serial = [call() for call in calls]
    done, begun = threading.Event(), threading.Barrier(3)
    numbers = torch.arange(1 << 18, dtype=torch.float64)

    def other_work() -> None:
        begun.wait(timeout=60)
        while not done.is_set():
            assert numbers.sum() == (1 << 17) * ((1 << 18) - 1)

    with ThreadPoolExecutor(2) as pool:
        working = [pool.submit(other_work) for _ in range(2)]
        begun.wait(timeout=60)
        try:
            found = at_once(calls)
        finally:
            done.set()
        for future in working:
            future.result(timeout=60)
    for got, want in zip(found, serial, strict=True):
        assert all(same_bits(x, y) for x, y in zip(got, want, strict=True))


def test_one_graph_differentiated_in_another_thread(compiled_place):
    """Autograd runs a backward where it is asked for: the forward's thread may be gone."""
    adv, clean = oracle.logit_pair(50, 100, 0.3, device=compiled_place.device)
    leaf = adv.requires_grad_()
    (want,) = torch.autograd.grad(symmetric_kl(leaf, clean, backend=compiled_place.backend), leaf)
    losses = at_once([lambda: [symmetric_kl(leaf, clean, backend=compiled_place.backend)]] * THREADS)
    grads = at_once([lambda loss=loss: [torch.autograd.grad(loss[0], leaf)[0]] for loss in losses])
    assert all(same_bits(grad[0], want) for grad in grads)


FIRST_IMPORT = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
import torch
import alum_kernels
from alum_kernels.backends import native
assert "alum_kernels._C" not in sys.modules
barrier = threading.Barrier(8)
a, b = torch.linspace(0, 1, 12).view(2, 6), torch.linspace(1, 0, 12).view(2, 6)

def first(number):
    barrier.wait(timeout=60)
    if number % 2:
        native.require()  # as an op's module does when it is imported
    return alum_kernels.symmetric_kl(a, b, backend="native").item(), native.load()[0]

with ThreadPoolExecutor(8) as pool:
    results = list(pool.map(first, range(8)))
assert len({value for value, _ in results}) == 1, results
assert len({id(module) for _, module in results}) == 1
print("one module")
"""


@needs_native
def test_the_first_call_of_many_threads_loads_one_module():
    finished = subprocess.run(
        [sys.executable, "-c", FIRST_IMPORT], capture_output=True, text=True, check=False, timeout=120
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.strip() == "one module"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_streams_of_their_own(backend):
    """Each thread on a stream: launches follow the thread's current one, and results are as on the default stream."""
    calls = divergence_calls("cuda", backend, 1000, 200)

    def on_a_stream(call: Call) -> list[Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            results = call()
        stream.synchronize()
        return results

    serial = [call() for call in calls]
    torch.cuda.synchronize()
    found = at_once([lambda call=call: on_a_stream(call) for call in calls])
    for got, want in zip(found, serial, strict=True):
        assert all(same_bits(x, y) for x, y in zip(got, want, strict=True))
