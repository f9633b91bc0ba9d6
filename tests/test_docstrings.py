"""Every example in a docstring of the package runs and prints what it says; what is public names its arguments."""

import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from enum import Enum
from types import ModuleType
from typing import Any

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


PARTS = (
    "finite_steps",
    "rescaled_ascent",
    "sft_loss",
    "step_watch",
    "trainer_counts",
    "trainer_distribution",
    "trainer_losses",
)
"""Integrations that a user does not import from."""

CALLED_BY_A_FRAMEWORK = {
    "AdversarialTrainerMixin": ("transformers", "Trainer"),
    "AdversarialModuleMixin": ("lightning", "LightningModule"),
}
"""Mixins, and the class whose methods they override: it documents their arguments."""


def public_modules() -> list[str]:
    """The packages that a user imports from, and each integration."""
    folder = importlib.import_module("alum_kernels.integrations").__path__
    integrations = [
        f"alum_kernels.integrations.{info.name}" for info in pkgutil.iter_modules(folder) if info.name not in PARTS
    ]
    return ["alum_kernels", "alum_kernels.evaluation", "alum_kernels.adversarial.presets", *integrations]


def exported(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """What a module has in ``__all__``, or else defines under a name without an underscore."""
    names = [
        name
        for name, member in vars(module).items()
        if not name.startswith("_") and getattr(member, "__module__", None) == module.__name__
    ]
    for name in getattr(module, "__all__", names):
        if callable(getattr(module, name)):
            yield name, getattr(module, name)


def own_methods(kind: type) -> Iterator[str]:
    """Public methods of a class, without those by which a framework calls it."""
    foreign = [base for base in kind.__mro__[1:] if not base.__module__.startswith("alum_kernels")]
    if kind.__name__ in CALLED_BY_A_FRAMEWORK:
        package, base = CALLED_BY_A_FRAMEWORK[kind.__name__]
        foreign.append(getattr(importlib.import_module(package), base))
    for name in vars(kind):
        public = not name.startswith("_") and inspect.isroutine(getattr(kind, name))
        if public and not any(hasattr(base, name) for base in foreign):
            yield name


def unnamed_arguments(function: Callable, text: str) -> list[str]:
    """Arguments that a docstring does not name, nor that of a function whose arguments it says it has."""
    for other in re.findall(r"arguments as :(?:func|meth):`([\w.]+)`", text):
        scope = inspect.getmodule(function)
        text += getattr(scope, other, None).__doc__ or ""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    arguments = [name for name, one in inspect.signature(function).parameters.items() if one.kind not in variadic]
    return [name for name in arguments if name != "self" and not re.search(rf"\b{name}\b", text)]


@pytest.mark.parametrize("name", public_modules())
def test_public_docstrings_name_their_arguments(name):
    module = load(name)
    missing = {}
    checked = 0
    for label, member in exported(module):
        functions = {label: member}
        if inspect.isclass(member):
            functions |= {f"{label}.{method}": getattr(member, method) for method in own_methods(member)}
            if issubclass(member, BaseException | Enum):  # made by a raise, or by a look-up
                del functions[label]
        for place, function in functions.items():
            checked += 1
            text = function.__doc__
            if not text or unnamed_arguments(function, text):
                missing[place] = unnamed_arguments(function, text) if text else "no docstring"
    assert checked
    assert not missing


def test_arguments_that_are_not_named_are_found():
    def documented_elsewhere(adv_logits, extra):
        """One more; arguments as :func:`load`."""

    assert unnamed_arguments(documented_elsewhere, documented_elsewhere.__doc__) == ["adv_logits", "extra"]
    assert unnamed_arguments(documented_elsewhere, "``extra`` and ``adv_logits_too``") == ["adv_logits"]
