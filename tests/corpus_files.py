"""Files for the readers of training data and settings, and the errors that they raise."""

from pathlib import Path

import pytest

from alum_kernels.corpora import CorpusError


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def raises(path: Path, message: str):
    """The error of a file, whose message goes on like this behind the path."""
    return pytest.raises(CorpusError, match=f"^{path}{message}")
