"""The fp32 functions that every kernel calls: C++ and Triton, against 40 digits and against each other."""

import inspect
import random
import re
from pathlib import Path

import mpmath
import numpy as np
import oracle
import pytest
import torch

from alum_kernels.backends.native import load
from alum_kernels.backends.triton import unavailable

HEADER = Path(__file__).parents[1] / "csrc" / "core" / "elementary.h"
NATIVE, NATIVE_REASON = load()
needs_native = pytest.mark.skipif(NATIVE is None, reason=f"native module: {NATIVE_REASON}")
TRITON_REASON = unavailable("noise_init", torch.device("cpu"), torch.float32, None)

# (lowest, highest) argument, function in many digits, largest relative error: the one that elementary.h states for the
# polynomial, and half an ulp (6e-8) for each of the operations around it without fused multiply-adds.
FUNCTIONS = {
    "exp": ((-87.2, 88.0), mpmath.exp, 1.6e-7),
    "g_series": ((-0.3, 0.3), lambda x: mpmath.expm1(x) - x, 3.4e-7),
    "log": ((1e-38, 3e38), mpmath.log, 2.0e-7),
    "log1p": ((-0.999, 1e30), mpmath.log1p, 2.0e-7),
    "cos_quarter": ((-0.5, 0.5), lambda x: mpmath.cos(mpmath.pi * x / 2), 1.5e-7),
    "sin_quarter": ((-0.5, 0.5), lambda x: mpmath.sin(mpmath.pi * x / 2), 2.4e-7),
}


def arguments(name: str, count: int) -> list[float]:
    """fp32 arguments over the whole domain: evenly, near zero (or one), and by order of magnitude."""
    (low, high), _, _ = FUNCTIONS[name]
    draw = random.Random(name)
    values = []
    for _ in range(count):
        if name == "log":
            values += [2.0 ** draw.uniform(-126, 128), draw.uniform(0.5, 2.0), 1 + draw.uniform(-1e-3, 1e-3)]
        elif name == "log1p":
            values += [draw.uniform(-0.999, 2.0), draw.choice((-1, 1)) * 10 ** draw.uniform(-37, -1),
                       10 ** draw.uniform(0, 30)]  # fmt: skip
        else:
            values += [draw.uniform(low, high), draw.choice((-1, 1)) * 10 ** draw.uniform(-18, -2) * high]
    return [float(np.float32(x)) for x in values if np.float32(x) != 0]


@needs_native
@pytest.mark.parametrize("name", FUNCTIONS)
def test_against_forty_digits(name):
    _, exact, bound = FUNCTIONS[name]
    worst, where = 0.0, 0.0
    with mpmath.workdps(40):
        for x in arguments(name, 4000):
            want = exact(mpmath.mpf(x))
            if abs(want) < 2.0**-126:
                continue
            error = float(abs(NATIVE.elementary(name, x) - want) / abs(want))
            if error > worst:
                worst, where = error, x
    assert worst <= bound, f"{name}({where!r}) is off by {worst:.2e}"


@needs_native
def test_ends_of_the_domain():
    assert NATIVE.elementary("exp", -87.4) == 0.0
    assert NATIVE.elementary("exp", 0.0) == 1.0
    assert NATIVE.elementary("log", 1.0) == 0.0
    assert NATIVE.elementary("log1p", 0.0) == 0.0
    assert NATIVE.elementary("cos_quarter", 0.0) == 1.0
    with pytest.raises(ValueError, match="no elementary function tan"):
        NATIVE.elementary("tan", 0.0)


def horner(function) -> list[float]:
    """Coefficients of a Triton polynomial, constant first: the lines ``p = c * x + c``, ``p = p * x + c``."""
    source = inspect.getsource(function.fn)
    number = r"(-?[0-9][0-9.]*(?:e-?[0-9]+)?)"
    first = re.search(rf"p = {number} \* \w+ \+ {number}", source)
    rest = re.findall(rf"p = p \* \w+ \+ {number}", source)
    return [float(c) for c in reversed([*first.groups(), *rest])]


@pytest.mark.skipif(not HEADER.exists(), reason="not a checkout")
@pytest.mark.parametrize(
    ("array", "function"),
    [
        ("kExpm1", "_expm1_reduced"),
        ("kG", "g_series"),
        ("kLog1p", "_log1p_reduced"),
        ("kCos", "cos_quarter"),
        ("kSin", "sin_quarter"),
    ],
)
def test_coefficients_of_both_languages_are_the_same(array, function):
    pytest.importorskip("triton")
    from alum_kernels.backends.triton import elementary

    listed = re.search(rf"{array}\[\] = \{{([^}}]*)\}}", HEADER.read_text()).group(1)
    of_cpp = [float(c.strip().rstrip("f")) for c in listed.split(",")]
    of_triton = horner(getattr(elementary, function))
    assert len(of_cpp) >= 4
    assert of_cpp == of_triton
    assert all(float(np.float32(c)) == pytest.approx(c, rel=1e-8) for c in of_cpp)


@pytest.mark.skipif(not HEADER.exists(), reason="not a checkout")
def test_constants_of_both_languages_are_the_same():
    pytest.importorskip("triton")
    from alum_kernels.backends.triton import elementary

    text = HEADER.read_text()
    for constant in (elementary.LOG2E, elementary.LN2_HIGH, elementary.LN2_LOW, elementary.ROUND_TO_EXPONENT,
                     elementary.ROUND, elementary.LOWEST):  # fmt: skip
        numbers = {float(n) for n in re.findall(r"-?[0-9]+\.[0-9]+(?:e-?[0-9]+)?(?=f)", text)}
        assert constant.value in numbers


@needs_native
@pytest.mark.skipif(TRITON_REASON is not None, reason=f"triton: {TRITON_REASON}")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_interpreted_triton_gives_the_digits_of_cpp(name):
    """Both round alike but for fused multiply-adds, which neither has here: a few units in the last place."""
    import elementary_kernel

    x = torch.tensor(arguments(name, 680)[:2048])
    got = elementary_kernel.evaluate(name, x)
    want = torch.tensor([NATIVE.elementary(name, value) for value in x.tolist()])
    normal = want.abs() >= 2.0**-126
    error = ((got - want).abs() / want.abs())[normal]
    assert normal.sum() > 1000
    assert error.max() <= 4 * 2.0**-24


@needs_native
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1, 0x299F31D0A4093822])
def test_host_philox(seed):
    draw = random.Random(seed)
    for _ in range(200):
        counter = [draw.getrandbits(32) for _ in range(4)]
        assert NATIVE.philox(seed, counter) == oracle.philox(seed, np.array(counter, dtype=np.uint64)).tolist()


@needs_native
def test_row_offsets_beyond_two_to_the_thirty_one():
    """As every C++ kernel computes them: (O, I) rows, of which 2^31 elements are few."""
    draw = random.Random(0)
    for _ in range(500):
        inner, outer_step, inner_step = draw.randint(1, 4096), draw.randint(0, 2**40), draw.randint(0, 2**34)
        row = draw.randint(0, 2**24)
        want = row // inner * outer_step + row % inner * inner_step
        assert NATIVE.row_offset(row, inner, outer_step, inner_step) == want
    assert NATIVE.row_offset(70000, 1, 128256, 0) == 70000 * 128256 > 2**31
    assert NATIVE.row_offset(70000, 2**40, 0, 128256) == 70000 * 128256


def test_triton_offsets_are_sixty_four_bit():
    """Row and token numbers are widened before anything multiplies them."""
    pytest.importorskip("triton")
    from alum_kernels.backends.triton import linear_symmetric_kl, noise_init, projected_ascent, symmetric_kl

    sources = {
        symmetric_kl._tile_rows: "row = tl.program_id(0).to(tl.int64)",
        symmetric_kl._stream_rows: "row = tl.program_id(0).to(tl.int64)",
        symmetric_kl._gradient: "row = tl.program_id(0).to(tl.int64)",
        linear_symmetric_kl._tile_linear_rows: "row = tl.program_id(0).to(tl.int64)",
        linear_symmetric_kl._stream_linear_rows: "row = tl.program_id(0).to(tl.int64)",
        noise_init._noise_init: "token = tl.program_id(0).to(tl.int64)",
        projected_ascent._ascend: "begin = tl.program_id(0).to(tl.int64)",
        projected_ascent._tile: ".to(tl.int64)",
    }
    for kernel, widened in sources.items():
        source = inspect.getsource(kernel.fn)
        assert widened in source
        assert source.count("program_id(0)") == source.count("program_id(0).to(tl.int64)")
