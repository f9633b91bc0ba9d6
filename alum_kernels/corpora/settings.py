"""Settings from files."""

from pathlib import Path
from typing import Any

from alum_kernels.corpora.errors import CorpusError
from alum_kernels.corpora.lines import lines_of


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping of a YAML or JSON file.

    Raises:
        CorpusError: the file cannot be read, or holds no mapping.
    """
    import yaml

    try:
        found = yaml.safe_load("\n".join(lines_of(path)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise CorpusError(f"{place}: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(found, dict):
        raise CorpusError(f"{path}: expected a mapping, got {type(found).__name__}")
    return found
