"""Which backend serves a call, and what every wrong argument is told."""

import os
import subprocess
import sys

import pytest
import torch

import alum_kernels
from alum_kernels import (
    BackendUnavailableError,
    js,
    kl,
    noise_init,
    projected_ascent,
    squared_error,
    squared_hellinger,
    symmetric_kl,
    symmetric_kl_grad,
)
from alum_kernels.ops.dispatch import BACKENDS, FASTEST, choose, unavailable

EMBEDS = torch.zeros(2, 3, 4)
LOGITS = torch.zeros(2, 3, 5)
AS = r"logits: expected shape \(2, 3, 5\) as adv_logits, got "
DIVERGENCES = (symmetric_kl, kl, js, squared_hellinger, symmetric_kl_grad)
PAIRS = (*DIVERGENCES, squared_error)


def ascent(embeds=EMBEDS, grad=EMBEDS, delta=EMBEDS, **options):
    return projected_ascent(embeds, grad, delta, **{"step_size": 0.1, "epsilon": 0.1, **options})


def test_fresh_memory_is_poisoned():
    """What the whole suite relies on: an element that no kernel writes is NaN."""
    like = torch.ones(3, dtype=torch.bfloat16)
    for fresh in (torch.empty(3), torch.empty_like(like), like.new_empty(2), torch.empty(2, 2, dtype=torch.float16)):
        assert fresh.isnan().all()


def test_default_is_the_fastest_that_can_serve():
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        tensor = torch.zeros(2, 3, 4, device=device)
        able = [b for b in FASTEST[device] if unavailable("noise_init", b, tensor.device, tensor.dtype) is None]
        assert choose("noise_init", None, tensor) == able[0]
        assert choose("symmetric_kl", None, tensor, "js") == "reference"
        assert choose("symmetric_kl", None, tensor, "squared_hellinger") == "reference"
        assert choose("symmetric_kl", None, tensor.double(), "kl") == "reference"
    assert choose("noise_init", None, EMBEDS.to("meta")) == "reference"


def test_public_functions_are_listed():
    assert {f.__name__ for f in (*PAIRS, noise_init, projected_ascent)} <= set(alum_kernels.__all__)
    assert all(hasattr(alum_kernels, name) for name in alum_kernels.__all__)


@pytest.mark.parametrize("function", DIVERGENCES)
def test_unknown_backend_lists_the_known_ones(function):
    with pytest.raises(ValueError, match=r"backend: expected one of 'reference', 'native', 'triton', got 'cuda'"):
        function(LOGITS, LOGITS, backend="cuda")


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_backend_that_cannot_serve_says_why(backend):
    if (reason := unavailable("noise_init", backend, EMBEDS.device, EMBEDS.dtype)) is not None:
        with pytest.raises(BackendUnavailableError) as caught:
            noise_init(EMBEDS, backend=backend)
        assert str(caught.value) == f"backend='{backend}' cannot serve noise_init on cpu: {reason}"
        return
    with pytest.raises(BackendUnavailableError, match="float64 is served by the reference backend only"):
        noise_init(EMBEDS.double(), backend=backend)
    with pytest.raises(BackendUnavailableError, match="float64 is served by the reference backend only"):
        ascent(*[EMBEDS.double()] * 3, backend=backend)
    with pytest.raises(BackendUnavailableError, match="js is served by the reference backend only"):
        js(LOGITS, LOGITS, backend=backend)
    with pytest.raises(BackendUnavailableError, match="squared_hellinger is served by the reference backend only"):
        symmetric_kl_grad(LOGITS, LOGITS, divergence="squared_hellinger", backend=backend)
    with pytest.raises(BackendUnavailableError, match=rf"backend='{backend}' cannot serve noise_init on meta: it .*"):
        noise_init(EMBEDS.to("meta"), seed=torch.zeros(1, dtype=torch.int64, device="meta"), backend=backend)


def test_triton_on_the_cpu_needs_the_interpreter():
    """Asked for without TRITON_INTERPRET=1, it raises with the way out."""
    code = (
        "import torch, alum_kernels\n"
        "try:\n"
        "    alum_kernels.noise_init(torch.zeros(1, 1, 4), backend='triton')\n"
        "except alum_kernels.BackendUnavailableError as error:\n"
        "    print(error)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.strip() == (
        "backend='triton' cannot serve noise_init on cpu: CPU tensors need the interpreter: set TRITON_INTERPRET=1 "
        "before the first import of triton"
    )


def wrong_pairs() -> dict[str, tuple[dict, type[Exception], str]]:
    """Arguments of the functions of two logits, each with what it raises."""
    good = {"adv_logits": LOGITS, "logits": LOGITS}
    mask = torch.ones(2, 3, dtype=torch.bool)
    cases = {
        "no row dimension": (
            {"adv_logits": LOGITS[0, 0], "logits": LOGITS[0, 0]},
            ValueError,
            r"adv_logits: expected shape \(\.\.\., \w\) with a row dimension, got \(5,\)",
        ),
        "shapes": ({"logits": LOGITS[:, :2]}, ValueError, AS + r"\(2, 2, 5\)"),
        "classes": ({"logits": LOGITS[..., :4]}, ValueError, AS + r"\(2, 3, 4\)"),
        "broadcast": ({"logits": LOGITS[:1]}, ValueError, AS + r"\(1, 3, 5\)"),
        "devices": ({"logits": LOGITS.to("meta")}, ValueError, r"logits: expected device cpu as adv_logits, got meta"),
        "dtypes": (
            {"logits": LOGITS.bfloat16()},
            TypeError,
            r"logits: expected dtype torch\.float32 as adv_logits, got torch\.bf",
        ),
        "integer": (
            {"adv_logits": LOGITS.long()},
            TypeError,
            r"adv_logits: expected a dtype among float32, .*, got int64",
        ),
        "integer clean": ({"logits": LOGITS.int()}, TypeError, r"logits: expected a dtype among .*, got int32"),
        "complex": (
            {"adv_logits": LOGITS.to(torch.complex64)},
            TypeError,
            r"adv_logits: expected a dtype among .*, got complex64",
        ),
        "no tensor": ({"adv_logits": [[1.0]]}, TypeError, r"adv_logits: expected a tensor, got list"),
        "mask shape": ({"mask": mask[:, :2]}, ValueError, r"mask: expected shape \(2, 3\), got \(2, 2\)"),
        "mask rank": ({"mask": mask[0]}, ValueError, r"mask: expected shape \(2, 3\), got \(3,\)"),
        "mask dtype": (
            {"mask": mask.float()},
            TypeError,
            r"mask: expected bool or integers 0 and 1, got torch\.float32",
        ),
        "mask device": ({"mask": mask.to("meta")}, ValueError, r"mask: expected device cpu, got meta"),
        "mask list": ({"mask": [[1, 1, 1]]}, TypeError, r"mask: expected a tensor, got list"),
        "reduction": (
            {"reduction": "avg"},
            ValueError,
            r"reduction: expected one of 'mean', 'sum', 'batchmean', 'none', got 'avg'",
        ),
        "gradient": (
            {"gradient": "half"},
            ValueError,
            r"gradient: expected one of 'full', .*'detach_clean', got 'half'",
        ),
    }
    return {name: ({**good, **given}, error, message) for name, (given, error, message) in cases.items()}


@pytest.mark.parametrize("case", wrong_pairs())
@pytest.mark.parametrize("function", PAIRS, ids=lambda f: f.__name__)
def test_wrong_logits(function, case):
    arguments, error, message = wrong_pairs()[case]
    with pytest.raises(error, match=message):
        function(**arguments)


@pytest.mark.parametrize("function", DIVERGENCES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, r"temperature: expected a number > 0, got 0"),
        ({"temperature": -1.0}, ValueError, r"temperature: expected a finite number >= 0, got -1\.0"),
        ({"temperature": float("nan")}, ValueError, r"temperature: expected a finite number >= 0, got nan"),
        ({"temperature": "hot"}, TypeError, r"temperature: expected a number, got str"),
    ],
)
def test_wrong_temperature(function, options, error, message):
    with pytest.raises(error, match=message):
        function(LOGITS, LOGITS, **options)


@pytest.mark.parametrize("function", DIVERGENCES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_classes(function, backend):
    empty = torch.zeros(2, 0)
    with pytest.raises(ValueError, match=r"adv_logits: expected at least one class, got shape \(2, 0\)"):
        function(empty, empty, backend=backend)


def test_wrong_arguments_of_the_loss_with_gradient():
    with pytest.raises(
        ValueError, match=r"divergence: expected one of 'symmetric_kl', 'kl', 'js', 'squared_hellinger', got 'mse'"
    ):
        symmetric_kl_grad(LOGITS, LOGITS, divergence="mse")
    with pytest.raises(ValueError, match=r"grad_scale: expected a finite number >= 0, got inf"):
        symmetric_kl_grad(LOGITS, LOGITS, grad_scale=float("inf"))


@pytest.mark.parametrize("name", ["js", "squared_hellinger"])
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_raw_ops_take_no_divergence_for_another(backend, name):
    """Kernels have a branch for kl and one for the rest: a name that they do not know must not reach them."""
    ops, rows, statistics = torch.ops.alum_kernels, torch.zeros(2, 3), torch.zeros(5, 2, 3)
    calls = (
        lambda: ops.symmetric_kl_loss(LOGITS, LOGITS, None, name, 1.0, backend),
        lambda: ops.symmetric_kl_gradient(LOGITS, LOGITS, statistics, rows, name, "full", 1.0, True, True, backend),
        lambda: ops.symmetric_kl_loss_and_gradient(LOGITS, LOGITS, None, name, "full", 1.0, 1.0, True, backend),
    )
    for call in calls:
        with pytest.raises(ValueError, match=rf"divergence: expected one of 'symmetric_kl', 'kl', got '{name}'"):
            call()


MAGNITUDES = [
    (-1.0, ValueError, r": expected a finite number >= 0, got -1\.0"),
    (float("nan"), ValueError, r": expected a finite number >= 0, got nan"),
    (float("inf"), ValueError, r": expected a finite number >= 0, got inf"),
    (True, TypeError, r": expected a float or an fp32 tensor, got bool"),
    ("1e-5", TypeError, r": expected a float or an fp32 tensor, got str"),
    (torch.tensor(1.0, dtype=torch.float64), TypeError, r": expected a float or an fp32 tensor, got torch\.float64"),
    (torch.zeros(3), ValueError, r": expected shape \(\), \(2,\) or \(2, 3\), got \(3,\)"),
    (torch.zeros(2, 3, 4), ValueError, r": expected shape \(\), \(2,\) or \(2, 3\), got \(2, 3, 4\)"),
    (torch.zeros((), device="meta"), ValueError, r": expected device cpu, got meta"),
]


@pytest.mark.parametrize(("value", "error", "message"), MAGNITUDES)
def test_wrong_magnitudes(value, error, message):
    with pytest.raises(error, match="std" + message):
        noise_init(EMBEDS, std=value)
    for name in ("step_size", "epsilon", "std"):
        with pytest.raises(error, match=name + message):
            ascent(**{name: value})


NOISE = [
    ({"distribution": "gauss"}, ValueError, r"distribution: expected one of 'normal', 'uniform', got 'gauss'"),
    ({"stream": -1}, ValueError, r"stream: expected 0 <= stream < 2\^32, got -1"),
    ({"stream": 2**32}, ValueError, r"stream: expected 0 <= stream < 2\^32, got 4294967296"),
    ({"sample_offset": -1}, ValueError, r"sample_offset: expected a number >= 0, got -1"),
    ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"mask: expected shape \(2, 3\), got \(2, 4\)"),
    ({"mask": torch.ones(2, 3)}, TypeError, r"mask: expected bool or integers 0 and 1, got torch\.float32"),
]
SEEDS = [
    (torch.zeros(1, dtype=torch.int32), TypeError, r"seed: expected dtype torch\.int64, got torch\.int32"),
    (torch.zeros(2, dtype=torch.int64), ValueError, r"seed: expected one element, got shape \(2,\)"),
    (torch.zeros(1, dtype=torch.int64, device="meta"), ValueError, r"seed: expected device cpu, got meta"),
    (1.5, TypeError, r"seed: expected a one-element int64 tensor, an int or None, got float"),
    (True, TypeError, r"seed: expected a one-element int64 tensor, an int or None, got bool"),
]


@pytest.mark.parametrize(("options", "error", "message"), NOISE)
def test_wrong_noise(options, error, message):
    with pytest.raises(error, match=message):
        noise_init(EMBEDS, **options)
    with pytest.raises(error, match=message):
        ascent(**options)


@pytest.mark.parametrize(("seed", "error", "message"), SEEDS)
def test_wrong_seed(seed, error, message):
    with pytest.raises(error, match=message):
        noise_init(EMBEDS, seed=seed)
    with pytest.raises(error, match=message):
        ascent(delta=None, seed=seed)


@pytest.mark.parametrize(
    ("embeds", "error", "message"),
    [
        (EMBEDS[0], ValueError, r"embeds: expected 3 dimensions \(B, S, H\), got shape \(3, 4\)"),
        (EMBEDS.long(), TypeError, r"embeds: expected a dtype among .*, got int64"),
        ("embeds", TypeError, r"embeds: expected a tensor, got str"),
    ],
)
def test_wrong_embeddings(embeds, error, message):
    with pytest.raises(error, match=message):
        noise_init(embeds)
    with pytest.raises(error, match=message):
        ascent(embeds)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"grad": EMBEDS[:1]}, ValueError, r"grad: expected shape \(2, 3, 4\) as embeds, got \(1, 3, 4\)"),
        ({"grad": EMBEDS.to("meta")}, ValueError, r"grad: expected device cpu as embeds, got meta"),
        ({"grad": EMBEDS.int()}, TypeError, r"grad: expected a dtype among .*, got int32"),
        ({"delta": EMBEDS[..., :3]}, ValueError, r"delta: expected shape \(2, 3, 4\) as embeds, got \(2, 3, 3\)"),
        ({"delta": EMBEDS.half()}, TypeError, r"delta: expected torch\.float32 for .* got torch\.float16"),
        (
            {"embeds": EMBEDS.bfloat16(), "delta": EMBEDS.bfloat16()},
            TypeError,
            r"delta: expected torch\.float32 for torch\.bfloat16",
        ),
        ({"delta": EMBEDS.to("meta")}, ValueError, r"delta: expected device cpu as embeds, got meta"),
        ({"delta": None}, ValueError, r"delta, seed: expected exactly one of them, got neither"),
        ({"seed": 1}, ValueError, r"delta, seed: expected exactly one of them, got both"),
        ({"norm": "l1"}, ValueError, r"norm: expected one of 'linf', 'l2', 'linf_rescale', 'none', got 'l1'"),
        ({"normalize": "l1"}, ValueError, r"normalize: expected one of 'none', 'linf', 'l2', 'sign', got 'l1'"),
        ({"level": "word"}, ValueError, r"level: expected one of 'token', 'sequence', 'batch', got 'word'"),
        (
            {"norm": "l2", "level": "sequence", "epsilon": torch.ones(2, 3)},
            ValueError,
            r"norm='l2' at level='sequence' has one radius a sequence, so expected shape \(\) or \(B,\), got \(2, 3\)",
        ),
        (
            {"norm": "l2", "level": "batch", "epsilon": torch.ones(2)},
            ValueError,
            r"epsilon: norm='l2' at level='batch' has one radius a batch, so expected shape \(\), got \(2,\)",
        ),
    ],
)
def test_wrong_ascent(arguments, error, message):
    with pytest.raises(error, match=message):
        ascent(**arguments)


def test_missing_sizes_are_no_default():
    for missing in ("step_size", "epsilon"):
        with pytest.raises(TypeError, match=missing):
            projected_ascent(EMBEDS, EMBEDS, EMBEDS, **{"step_size": 1.0, "epsilon": 1.0} | {missing: None})


def test_raw_native_ops_stay_inside_their_tensors():
    """A direct call of the native ops with tensors that do not fit raises instead of writing elsewhere."""
    if unavailable("symmetric_kl", "native", torch.device("cpu"), torch.float32) is not None:
        pytest.skip("the native module is not there")
    ops = torch.ops.alum_kernels_native
    a, rows, statistics = torch.zeros(1, 4, 5), torch.zeros(1, 4), torch.zeros(5, 1, 4)
    wrong = {
        "rows": (a, a, None, rows[:, :3].contiguous(), statistics),
        "statistics": (a, a, None, rows, statistics[:4].contiguous()),
        "b: expected the shape": (a, a[:, :3], None, rows, statistics),
        "b: expected Float": (a, a.half(), None, rows, statistics),
        "a: expected neighbouring": (a.transpose(1, 2).contiguous().transpose(1, 2), a, None, rows, statistics),
        "row_weight": (a, a, rows[:, :3], rows, statistics),
    }
    for message, arguments in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            ops.symmetric_kl_loss(*arguments, 0, 1.0)
    embeds, seed = torch.zeros(2, 3, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="perturbed: expected 24 elements, got 12"):
        ops.noise_init(embeds, seed, None, 1.0, None, torch.zeros(12), torch.zeros(0), True, 0, 0)
    with pytest.raises(RuntimeError, match="delta: expected 24 contiguous elements"):
        ops.noise_init(embeds, seed, None, 1.0, None, embeds.clone(), torch.zeros(3), True, 0, 0)
