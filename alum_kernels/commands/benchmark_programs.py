"""Where the benchmark programs are: in the package, or in the repository that is the working directory."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence

from alum_kernels.commands.errors import CommandError

PACKAGES = ("alum_kernels.benchmarks", "benchmarks")
"""Looked for in this order."""


def found(module: str) -> str:
    """Full name of the benchmark program ``module``.

    Raises:
        CommandError: neither package is here, or has it.
    """
    for package in PACKAGES:
        name = f"{package}.{module}"
        try:
            if importlib.util.find_spec(name) is not None:
                return name
        except ModuleNotFoundError:  # the package itself
            continue
    raise CommandError(
        f"expected the benchmark program {module} in {' or '.join(PACKAGES)}, which are not here; "
        "run the command in a checkout of the repository"
    )


def run_program(module: str, arguments: Sequence[str], called: str) -> int:
    """Run it under the name that a person called it by.

    Raises:
        CommandError: see :func:`found`, or a package that it needs is not installed.
    """
    name, before = found(module), sys.argv
    sys.argv = [called, *arguments]
    try:
        return importlib.import_module(name).main()
    except BrokenPipeError:
        raise
    except OSError as error:  # such as of a file that it cannot write
        raise CommandError(str(error), status=1) from error
    except ModuleNotFoundError as error:
        raise CommandError(f"{name} needs the package {error.name}: pip install {error.name}") from error
    finally:
        sys.argv = before
