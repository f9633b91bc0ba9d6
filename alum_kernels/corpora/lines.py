"""Lines of a text file."""

from pathlib import Path

from alum_kernels.corpora.errors import CorpusError


def lines_of(path: Path) -> list[str]:
    """Lines of a UTF-8 file.

    Raises:
        CorpusError: the file cannot be read or is empty.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CorpusError(f"{path}: {error.strerror or error}") from error
    if not lines:
        raise CorpusError(f"{path}: the file is empty")
    return lines
