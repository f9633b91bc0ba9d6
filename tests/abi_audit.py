"""What a native module asks of the libraries around it: torch's stable C functions, CPython, the C and C++ runtimes.

    python tests/abi_audit.py alum_kernels/_C*.so

The stable functions of torch are those that the headers of the installed torch declare for ``TORCH_TARGET_VERSION``
2.10: what stands under a guard of a later feature version does not count. Symbols of the runtimes carry the name of
their version (``memcpy@GLIBC_2.14``); the highest of each is what the module needs of a system. A C++ function of
torch (``at::``, ``c10::``, ``torch::``) is in none of these sets, and neither is one that only later torches have.
"""

import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

TARGET = (2, 10)
SHIMS = ("torch/csrc/inductor/aoti_torch/c/shim.h", "torch/csrc/stable/c/shim.h")
INCLUDE = Path(torch.__file__).parent / "include"

_GUARD = re.compile(r"#\s*if\s+TORCH_FEATURE_VERSION\s*>=\s*TORCH_VERSION_(\d+)_(\d+)_\d+\s*(?://.*)?")
_FUNCTION = re.compile(r"AOTI_TORCH_EXPORT[^;({]*?\b(\w+)\s*\(")
_VERSION = re.compile(r"(?P<name>[^@]+)@+(?P<library>GLIBC|GLIBCXX|CXXABI|GCC)_(?P<version>[\d.]+)")
_CPYTHON = re.compile(r"_?Py[A-Z_]\w*")
_TOOLCHAIN = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
"""Weak places that the linker leaves in every shared library; null without the tool that fills them."""


@dataclass
class Audit:
    """Who provides the undefined symbols of a module."""

    torch: set[str] = field(default_factory=set)
    cpython: set[str] = field(default_factory=set)
    runtimes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Highest version of each library: ``{"GLIBC": (2, 32)}``."""
    outside: set[str] = field(default_factory=set)
    """Nobody of those: what must not be there."""


def stable_functions(header: str, target: tuple[int, int] = TARGET) -> set[str]:
    """The exported C functions that a shim header declares for a target version of torch.

    Args:
        header: text of the header. Of its conditions only those on the feature version are evaluated; what stands under
            another one (such as ``USE_CUDA``) counts as declared.
        target: (major, minor).

    Raises:
        ValueError: a condition on the feature version in a form that is not ``>=`` alone, or with an ``#else``.
    """
    open_conditions: list[tuple[bool, bool]] = []  # (about the feature version, true for the target)
    kept = []
    for line in re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL).splitlines():
        directive = line.strip()
        if directive.startswith("#"):
            if re.match(r"#\s*if", directive):
                guard = _GUARD.fullmatch(directive)
                if guard is None and "TORCH_FEATURE_VERSION" in directive:
                    raise ValueError(f"header: expected TORCH_FEATURE_VERSION >= TORCH_VERSION_x_y_z, got {directive}")
                open_conditions.append((guard is not None, guard is None or target >= tuple(map(int, guard.groups()))))
            elif re.match(r"#\s*el", directive) and open_conditions[-1][0]:
                raise ValueError(f"header: expected no alternative to a feature version, got {directive}")
            elif re.match(r"#\s*endif", directive):
                open_conditions.pop()
        elif all(true for _, true in open_conditions):
            kept.append(line.split("//")[0])
    return set(_FUNCTION.findall("\n".join(kept)))


def stable_torch(include: Path = INCLUDE) -> set[str]:
    """The stable functions of the torch whose headers these are."""
    return set().union(*(stable_functions((include / shim).read_text()) for shim in SHIMS))


def _dynamic_symbols(library: Path, which: str) -> list[str]:
    listed = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in listed.splitlines() if line.strip()]


def undefined_symbols(module: Path) -> list[str]:
    """Names that the loader must find elsewhere, with the version where there is one: ``memcpy@GLIBC_2.14``."""
    return _dynamic_symbols(module, "--undefined-only")


def runtime_exports() -> set[str]:
    """What this system's libstdc++ defines: a symbol that torch's libraries also carry is linked without a version."""
    found = subprocess.run(["g++", "-print-file-name=libstdc++.so.6"], capture_output=True, text=True, check=True)
    return {name.split("@")[0] for name in _dynamic_symbols(Path(found.stdout.strip()), "--defined-only")}


def audit(undefined: Iterable[str], stable: set[str], runtime: set[str]) -> Audit:
    """Sort undefined symbols by who provides them.

    Args:
        undefined: as of :func:`undefined_symbols`.
        stable: as of :func:`stable_torch`.
        runtime: as of :func:`runtime_exports`.
    """
    found = Audit()
    for symbol in undefined:
        if versioned := _VERSION.fullmatch(symbol):
            library, version = versioned["library"], tuple(map(int, versioned["version"].split(".")))
            found.runtimes[library] = max(version, found.runtimes.get(library, ()))
        elif symbol in stable:
            found.torch.add(symbol)
        elif _CPYTHON.fullmatch(symbol):
            found.cpython.add(symbol)
        elif symbol not in _TOOLCHAIN and symbol not in runtime:
            found.outside.add(symbol)
    return found


def report(module: Path, found: Audit) -> str:
    """One line a library, and one for every symbol that is outside."""
    needs = ", ".join(f"{name} {'.'.join(map(str, version))}" for name, version in sorted(found.runtimes.items()))
    lines = [
        f"{module.name}: {len(found.torch)} functions of torch's stable ABI {'.'.join(map(str, TARGET))}, "
        f"{len(found.cpython)} of CPython; at least {needs}",
        *(f"  outside the stable ABI: {symbol}" for symbol in sorted(found.outside)),
    ]
    return "\n".join(lines)


def main(modules: list[str]) -> int:
    """Audit each module; 1 where one of them needs anything else."""
    if not modules:
        print("usage: python tests/abi_audit.py MODULE.so ...", file=sys.stderr)
        return 2
    stable, runtime = stable_torch(), runtime_exports()
    audits = {Path(name): audit(undefined_symbols(Path(name)), stable, runtime) for name in modules}
    print("\n".join(report(module, found) for module, found in audits.items()))
    return 1 if any(found.outside for found in audits.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
