"""Files that hold one JSON object."""

import json
from pathlib import Path
from typing import Any

from alum_kernels.training.errors import TrainingError


def json_object(path: Path, place: str) -> dict[str, Any]:
    """The object in a file.

    Args:
        path: of the file.
        place: what an error begins with.

    Raises:
        TrainingError: there is none that can be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TrainingError(f"{place}: {error}") from error
    if not isinstance(found, dict):
        raise TrainingError(f"{place}: expected an object, got {type(found).__name__}")
    return found
