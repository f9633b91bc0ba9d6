"""Every example in a docstring of the package runs and prints what it says."""

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest

import alum_kernels

WITH_EXAMPLE = (
    "noise_init",
    "projected_ascent",
    "squared_error",
    "symmetric_kl",
    "kl",
    "js",
    "squared_hellinger",
    "symmetric_kl_grad",
)


def modules() -> list[str]:
    """Every module of the package but the command line and backends that need what may not be installed."""
    names = [info.name for info in pkgutil.walk_packages(alum_kernels.__path__, "alum_kernels.")]
    return [name for name in names if not name.endswith(("__main__", "._C"))]


def load(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name is not None and error.name.startswith("alum_kernels"):
            raise
        return pytest.skip(f"{name} needs {error.name}")


@pytest.mark.parametrize("name", modules())
def test_examples(name):
    module = load(name)
    found = [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in found:
        printed: list[str] = []
        failed, attempted = runner.run(test, out=printed.append, clear_globs=False)
        assert attempted == len(test.examples)
        assert failed == 0, "".join(printed)


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_public_ops_have_an_example(name):
    tests = doctest.DocTestFinder().find(getattr(alum_kernels, name), name)
    assert sum(len(test.examples) for test in tests) >= 2


@pytest.mark.parametrize("name", alum_kernels.__all__)
def test_public_names_are_documented(name):
    text = getattr(alum_kernels, name).__doc__
    assert text
    assert text.strip().splitlines()[0].rstrip().endswith((".", ":", "`"))
