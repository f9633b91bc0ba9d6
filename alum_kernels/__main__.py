"""``alum-kernels`` or ``python -m alum_kernels``: what is installed, training, evaluation and benchmarks.

Without a command it is ``info``.
"""

import importlib
import io
import os
import sys
from collections.abc import Sequence

from alum_kernels.commands.errors import CommandError
from alum_kernels.commands.invocation import program
from alum_kernels.commands.parser import OneLineParser, nearest

COMMANDS = {
    "info": "what is installed, and which backend serves which op here",
    "plan": "how rows of a vocabulary are laid out on a GPU",
    "train": "fine-tune a model or go on with its pre-training, with or without an adversary",
    "evaluate": "what a trained model gets right, and what it withstands",
    "bench": "run a benchmark",
    "report": "make a page of benchmarks' results",
}
"""Modules of ``alum_kernels.commands``, of which only the one that is called is imported."""

REFUSED, INTERRUPTED, READER_LEFT = 1, 130, 141


def main(given: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        given: its name and arguments; None takes those of the process.

    Returns:
        The exit code: 0, 2 where the request was at fault, 1 where the system refused something, 130 where it was
        interrupted.
    """
    words = list(sys.argv[1:] if given is None else given)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal has no characters for ends nothing
    try:
        code = _run(words)
        print(end="", flush=True)
        return code
    except BrokenPipeError:  # of head, or of a pager that was closed: there is nobody to tell
        _drop_output()
        return READER_LEFT
    except KeyboardInterrupt:
        return _said(" ".join([program(), *words[:1]]), "interrupted", INTERRUPTED)
    except OSError as error:  # such as a full disk behind standard output
        _drop_output()
        return _said(program(), str(error), REFUSED)


def _run(words: list[str]) -> int:
    if words[:1] in (["-h"], ["--help"]):
        print(_overview())
        return 0
    if words and not words[0].startswith("-"):
        name, *words = words
    else:
        name = "info"
    if name not in COMMANDS:
        nearest_name = nearest(name, COMMANDS)
        what = f"expected a command of {', '.join(COMMANDS)}, got {name!r}; the nearest is {nearest_name}"
        return _said(program(), what, 2)
    command = importlib.import_module(f"alum_kernels.commands.{name}")
    parser = OneLineParser(prog=f"{program()} {name}", description=command.__doc__)
    command.add_arguments(parser)
    arguments = parser.parse_args(words)
    try:
        return command.run(arguments)
    except CommandError as error:
        return _said(parser.prog, str(error), error.status)


def _said(who: str, what: str, status: int) -> int:
    """The status, after a line on standard error in which no file's name or content can steer a terminal."""
    line = " ".join(f"{who}: {what}".split())
    print("".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line), file=sys.stderr)
    return status


def _drop_output() -> None:
    """What standard output does not take goes nowhere, not to an error at the interpreter's end."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join([f"usage: {program()} [command] [options]", "", __doc__, "commands:", *lines])


if __name__ == "__main__":
    sys.exit(main())
