"""What only a checkout has: examples, tests, sources. An installed package says so where they are needed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
"""Of the checkout; where the package is installed, the folder of ``alum_kernels``."""


def is_checkout() -> bool:
    """Whether these files lie in a checkout (or in an unpacked source distribution)."""
    return (ROOT / "setup.py").exists() and (ROOT / "csrc").is_dir()


@contextlib.contextmanager
def imports_from_examples(program: str) -> Iterator[None]:
    """Around imports from ``examples``.

    Raises:
        ModuleNotFoundError: there is no such folder on the path; the message says where the program runs.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "examples":
            raise
        raise ModuleNotFoundError(
            f"{program} needs the folder examples/, which is not installed: run python -m benchmarks.{program} in a "
            "checkout of alum_kernels",
            name=error.name,
        ) from None
