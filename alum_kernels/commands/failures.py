"""What ends a command that trains or evaluates, said in one line: the same failures, in the same words."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from alum_kernels.adversarial.finite import NonFiniteError
from alum_kernels.adversarial.hooks import SiteError
from alum_kernels.adversarial.out_of_memory import ADVISED, refused_memory
from alum_kernels.commands.errors import CommandError
from alum_kernels.corpora import CorpusError
from alum_kernels.ops.dispatch import BackendUnavailableError
from alum_kernels.training.errors import TrainingError, WriteError

AT_FAULT = (TrainingError, CorpusError, SiteError, BackendUnavailableError)
"""Raised where what was asked for cannot be done."""


@contextmanager
def in_one_line(less_memory: str) -> Iterator[None]:
    """Raise what is foreseen within the context as a CommandError; anything else stays as it is.

    Args:
        less_memory: what needs less memory, for where an allocator refuses.

    Raises:
        CommandError: with status 2 where the request is at fault, and 1 where the machine or the numbers are.
    """
    try:
        yield
    except WriteError as error:
        raise CommandError(str(error), status=1) from error
    except NonFiniteError as error:
        raise CommandError(f"{error}; the last checkpoint is from before that", status=1) from error
    except AT_FAULT as error:
        raise CommandError(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        if not refused_memory(error):
            raise
        said = str(error) or "the system refused memory"
        advice = "" if ADVISED in said else f". {ADVISED}: {less_memory}"
        raise CommandError(said + advice, status=1) from error


def check_one_process(cure: str) -> None:
    """Refuse to run as one of several ranks, which would all do the same and write the same files.

    Args:
        cure: what several processes should do instead.

    Raises:
        CommandError: a launcher started several.
    """
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks.strip() not in ("", "1"):
        raise CommandError(f"expected one process, got WORLD_SIZE={ranks} of torchrun or another launcher; {cure}")
