"""Streamed rows of Triton in short blocks, so that small cases have many."""

import contextlib
from collections.abc import Iterator
from unittest import mock

COLUMNS = 64
MODULES = ("symmetric_kl", "linear_symmetric_kl")


@contextlib.contextmanager
def short_blocks() -> Iterator[None]:
    """The context within which rows of more than COLUMNS classes are streamed in blocks of as many."""
    with contextlib.ExitStack() as stack:
        for module in MODULES:
            for name in ("STREAM_BLOCK", "TILE_COLUMNS"):
                stack.enter_context(mock.patch(f"alum_kernels.backends.triton.{module}.{name}", COLUMNS))
        yield
