"""An argument parser whose errors are one line that names what was probably meant."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from alum_kernels.training.values import Convert


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid name that looks most like one that is not."""
    return difflib.get_close_matches(name, list(valid), n=1, cutoff=0.0)[0]


def checked(convert: Convert) -> Convert:
    """A converter of settings (:mod:`alum_kernels.training.values`) as the ``type`` of an argument."""

    def converted(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return converted


class OneLineParser(argparse.ArgumentParser):
    """As the parent, without its page of usage before an error and without abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_args(self, given: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """The parent's; an unknown option is named with the nearest one there is."""
        arguments, left = self.parse_known_args(given, namespace)
        if left:
            known = [option for action in self._actions for option in action.option_strings]
            asked = left[0].partition("=")[0]
            hint = f"; the nearest is {nearest(asked, known)}" if asked.startswith("-") else ""
            self.error(f"expected an option of this command, got {asked!r}{hint}")
        return arguments
