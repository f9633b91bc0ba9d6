"""How accurate the divergences are: kernels against float64 of the same inputs, the float64 oracle against 50 digits.

Every backend must keep these bounds; they are those of the formulas, not of an implementation, and are never widened.
"""

import itertools
import math

import mpmath
import oracle
import pytest
import torch
from conftest import Place

from alum_kernels import js, kl, squared_hellinger, symmetric_kl, symmetric_kl_grad

DIVERGENCES = {"symmetric_kl": symmetric_kl, "kl": kl, "js": js, "squared_hellinger": squared_hellinger}
PERTURBATIONS = (1e-6, 1e-5, 1e-3, 0.1, 1.0, 10.0)
WIDE_PERTURBATION = 50.0
KINDS = {"3randn": (3.0, 0.0), "8randn": (8.0, 0.0), "3randn+24": (3.0, 24.0), "8randn+24": (8.0, 24.0)}
ROWS = {2: 2048, 3: 2048, 17: 512, 64: 128, 65: 128, 1000: 32, 30522: 2}

GRADIENT_BOUND = 1e-5
WIDE_VALUE_BOUND, WIDE_GRADIENT_BOUND = 4e-6, 1e-4
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half a unit in the last place of a gradient: it is rounded once."""


def value_bound(columns: int) -> float:
    return 4e-6 if columns <= 64 else 1e-6


def check(place, name: str, columns: int, rows: int, kind: str, dtype: torch.dtype = torch.float32) -> None:
    """Values and both sides' gradients at every perturbation."""
    scale, raised = KINDS[kind]
    for seed, perturbation in enumerate((*PERTURBATIONS, WIDE_PERTURBATION)):
        a, b = oracle.logit_pair(
            rows, columns, perturbation, scale=scale, raised=raised, dtype=dtype, device=place.device, seed=seed
        )
        differ = (a != b).any(-1)
        a, b = a[differ].requires_grad_(), b[differ].requires_grad_()
        if a.shape[0] == 0:
            assert perturbation <= 1e-3  # bf16 and fp16 cannot hold so small a difference
            assert dtype != torch.float32
            continue
        got = DIVERGENCES[name](a, b, reduction="none", backend=place.backend)
        da, db = torch.autograd.grad(got.sum(), (a, b))
        wide = perturbation == WIDE_PERTURBATION
        where = f"{name} {place} V={columns} {kind} {dtype} perturbation {perturbation}"
        assert got.dtype == torch.float32
        assert got.isfinite().all(), where
        error = oracle.relative_error(got, oracle.divergence(name, a, b))
        assert error <= (WIDE_VALUE_BOUND if wide else value_bound(columns)), f"{where}: value off by {error:.1e}"
        bound = (WIDE_GRADIENT_BOUND if wide else GRADIENT_BOUND) + ROUNDING[dtype]
        for side, gradient, want in zip("ab", (da, db), oracle.divergence_gradient(name, a, b), strict=True):
            assert gradient.dtype == dtype
            assert gradient.isfinite().all(), where
            whole, median = oracle.gradient_errors(gradient, want)
            assert whole <= bound, f"{where}: gradient of {side} off by {whole:.1e}"
            assert median <= bound, f"{where}: median row of the gradient of {side} off by {median:.1e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", ROWS)
def test_symmetric_kl(compiled_place, columns, kind):
    check(compiled_place, "symmetric_kl", columns, ROWS[columns], kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [2, 3, 64, 65, 1000])
def test_kl(compiled_place, columns, kind):
    check(compiled_place, "kl", columns, ROWS[columns], kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", ROWS)
@pytest.mark.parametrize("name", ["js", "squared_hellinger"])
def test_served_by_the_reference(name, columns, kind):
    check(Place("reference", "cpu"), name, columns, ROWS[columns], kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [3, 64, 1000])
def test_half_precision_inputs(compiled_place, columns, kind, dtype):
    check(compiled_place, "symmetric_kl", columns, ROWS[columns], kind, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [2, 17, 64, 130])
def test_in_the_interpreter(interpreted_place, columns, kind):
    """The same bounds where Python runs the Triton kernels: fewer rows, rows in registers only."""
    check(interpreted_place, "symmetric_kl", columns, 32, kind)


@pytest.mark.parametrize(("name", "kind"), [("symmetric_kl", "3randn"), ("kl", "8randn+24")])
def test_streamed_rows_in_the_interpreter(interpreted_place, kind, name):
    check(interpreted_place, name, 9000, 2, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("columns", "rows"), [(2, 65536), (3, 65536), (30522, 16), (50257, 16), (128256, 16)])
def test_symmetric_kl_at_full_size(compiled_place, columns, rows, kind):
    check(compiled_place, "symmetric_kl", columns, rows, kind)


def hard_rows() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Some hundred rows where softmax divergences are hard: confident, nearly equal, far apart, or all of it."""
    rows = []
    for number, (columns, perturbation) in enumerate(itertools.product((2, 3, 17, 65), (1e-6, 1e-3, 1.0, 10.0, 50.0))):
        for scale, raised in KINDS.values():
            a, b = oracle.logit_pair(1, columns, perturbation, scale=scale, raised=raised, seed=number)
            rows.append((a[0], b[0]))
    written = (
        ([0.0, 0.0], [1e-30, 0.0]),
        ([100.0, 0.0], [100.0 + 2.0**-17, 0.0]),
        ([0.0, 700.0], [700.0, 0.0]),
        ([2e3, 0.0, -2e3], [-2e3, 0.0, 2e3]),
        ([30.0, 0.0, 0.0], [0.0, 0.0, 30.0]),
        ([1e3, 1e3 + 0.5, 0.0], [1e3 + 0.5, 1e3, 0.0]),
    )
    return rows + [(torch.tensor(a), torch.tensor(b)) for a, b in written]


def exact(a: torch.Tensor, b: torch.Tensor) -> dict[str, tuple[mpmath.mpf, list, list]]:
    """(value, d/da, d/db) of each divergence by its definition, in 50 digits beyond the range of the exponentials."""
    a, b = [mpmath.mpf(float(x)) for x in a], [mpmath.mpf(float(x)) for x in b]
    log_z_a = mpmath.log(mpmath.fsum(map(mpmath.exp, a)))
    log_z_b = mpmath.log(mpmath.fsum(map(mpmath.exp, b)))
    log_p, log_q = [x - log_z_a for x in a], [x - log_z_b for x in b]
    p, q = [mpmath.exp(x) for x in log_p], [mpmath.exp(x) for x in log_q]
    log_m = [mpmath.log((x + y) / 2) for x, y in zip(p, q, strict=True)]

    def divergence(weights, logs, other):
        return mpmath.fsum(w * (x - y) for w, x, y in zip(weights, logs, other, strict=True))

    def own_side(weights, logs, other):
        """dKL(w || other) / d(logits of w)."""
        total = divergence(weights, logs, other)
        return [w * (x - y - total) for w, x, y in zip(weights, logs, other, strict=True)]

    p_q, q_p = divergence(p, log_p, log_q), divergence(q, log_q, log_p)
    difference = [x - y for x, y in zip(p, q, strict=True)]
    roots = [mpmath.sqrt(x * y) for x, y in zip(p, q, strict=True)]
    overlap = mpmath.fsum(roots)
    to_p, to_q = own_side(p, log_p, log_q), own_side(q, log_q, log_p)
    return {
        "symmetric_kl": (
            p_q + q_p,
            [x + y for x, y in zip(to_p, difference, strict=True)],
            [x - y for x, y in zip(to_q, difference, strict=True)],
        ),
        "kl": (q_p, difference, to_q),
        "js": (
            (divergence(p, log_p, log_m) + divergence(q, log_q, log_m)) / 2,
            [x / 2 for x in own_side(p, log_p, log_m)],
            [x / 2 for x in own_side(q, log_q, log_m)],
        ),
        "squared_hellinger": (
            1 - overlap,
            [(x * overlap - root) / 2 for x, root in zip(p, roots, strict=True)],
            [(x * overlap - root) / 2 for x, root in zip(q, roots, strict=True)],
        ),
    }


def test_oracle_against_fifty_digits():
    """Value, both gradients, every divergence: what the kernels are measured by has no fault of its own."""
    counted = 0
    for a, b in hard_rows():
        # weights of e^-spread lie beside 1, and squares of 1e-30: so many digits more are carried for 50 to be left
        spread = float(a.abs().max() + b.abs().max())
        with mpmath.workdps(130 + math.ceil(2 * spread / math.log(10))):
            for name, (value, da, db) in exact(a, b).items():
                x = a.double()[None].requires_grad_()
                y = b.double()[None].requires_grad_()
                got = DIVERGENCES[name](x, y, reduction="none", backend="reference")
                assert got.dtype == torch.float64
                error = abs(mpmath.mpf(got.item()) - value) / value
                assert error <= 2e-14, f"{name} of {a.tolist()[:3]}, {b.tolist()[:3]}: off by {float(error):.1e}"
                for gradient, want in zip(torch.autograd.grad(got, (x, y)), (da, db), strict=True):
                    size = mpmath.sqrt(mpmath.fsum(w * w for w in want))
                    gap = [mpmath.mpf(g) - w for g, w in zip(gradient[0].tolist(), want, strict=True)]
                    error = mpmath.sqrt(mpmath.fsum(g * g for g in gap)) / size
                    if size > 1e-300:
                        assert error <= 1e-13, f"gradient of {name}: off by {float(error):.1e}"
                        counted += 1
    assert counted > 400


@pytest.mark.parametrize("name", DIVERGENCES)
def test_float32_reference_keeps_the_bounds_of_the_oracle_it_is(name):
    """In fp32 the reference differs from itself in float64 by rounding only, at every perturbation."""
    for perturbation in PERTURBATIONS:
        a, b = oracle.logit_pair(512, 30, perturbation)
        got = DIVERGENCES[name](a, b, reduction="none", backend="reference")
        assert oracle.relative_error(got, oracle.divergence(name, a, b)) <= value_bound(30)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("columns", [3, 100, 3000])
def test_gradient_of_confident_rows_at_any_temperature(compiled_place, columns, temperature):
    """At the largest class d is zero to the bit at any temperature: p - q lies far below the rounding of d there."""
    torch.manual_seed(columns)
    b = 3 * torch.randn(64, columns, device=compiled_place.device)
    b[:, 1] += 24
    a = b + 0.1 * torch.randn_like(b)
    _, ours = symmetric_kl_grad(a, b, temperature=temperature, reduction="sum", backend=compiled_place.backend)
    _, truth = symmetric_kl_grad(
        a.cpu().double(), b.cpu().double(), temperature=temperature, reduction="sum", backend="reference"
    )
    error = (ours.cpu().double() - truth).norm(dim=1) / truth.norm(dim=1)
    assert error.median() < 1e-5
