"""Running text from files."""

from pathlib import Path

from alum_kernels.corpora.lines import lines_of


def read_paragraphs(path: Path) -> list[str]:
    """Lines of a file that are not blank.

    Raises:
        CorpusError: the file cannot be read or is empty.
    """
    return [line.strip() for line in lines_of(path) if line.strip()]
