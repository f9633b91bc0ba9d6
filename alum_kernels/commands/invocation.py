"""How the program was called: for its messages, and to be called again."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

MODULE = "python -m alum_kernels"


def program() -> str:
    """What a person typed: the module, or the installed script."""
    called = Path(sys.argv[0]).name
    return called if called.startswith("alum-kernels") else MODULE


def again(arguments: Sequence[str]) -> str:
    """The line for a shell that calls the program with these arguments, in the same interpreter."""
    called = Path(sys.argv[0])
    words = [str(called)] if called.name.startswith("alum-kernels") else [sys.executable, "-m", "alum_kernels"]
    return shlex.join([*words, *arguments])
