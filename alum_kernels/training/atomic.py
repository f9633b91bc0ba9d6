"""Files and folders that are there whole or not at all, whatever ends the process or the machine.

They are written under a temporary name in the same folder, brought to the disk, and renamed.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alum_kernels.training.errors import WriteError

PARTIAL = ".partial-"
"""What begins the name of everything that is not whole."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise WriteError, naming ``path``, where the system does not take what is written within the context.

    Libraries in Rust, which write weights and tokenizers, have exceptions of their own, with the system's in the text.
    """
    try:
        yield
    except Exception as error:
        if not (isinstance(error, OSError) or "(os error " in str(error)):
            raise
        raise WriteError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """A file with this text, in place of one that is there.

    Raises:
        WriteError: it cannot be written.
    """
    partial = path.with_name(PARTIAL + path.name)
    with writing(path):
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
        sync(path.parent)


def begin_folder(path: Path) -> Path:
    """An empty folder to be filled and given to :func:`finish_folder`."""
    partial = path.with_name(PARTIAL + path.name)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def finish_folder(partial: Path, path: Path) -> None:
    """Give a filled folder its name; one that has the name goes."""
    for file in sorted(partial.iterdir()):
        sync(file)
    sync(partial)
    if path.exists():
        remove_folder(path)
    partial.rename(path)
    sync(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder so that no half of it is ever taken for the whole."""
    leaving = path.with_name(f"{PARTIAL}removed-{path.name}")
    if leaving.exists():
        shutil.rmtree(leaving)
    path.rename(leaving)
    shutil.rmtree(leaving)


def remove_partial(folder: Path) -> list[str]:
    """Remove what a process that ended left half written; the names of it."""
    left = sorted(folder.glob(f"{PARTIAL}*"))
    for path in left:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return [path.name for path in left]
