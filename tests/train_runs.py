"""Runs of ``alum-kernels train`` in tests: small files, and the command in this process."""

from pathlib import Path

from alum_kernels import __main__ as command_line


def sentences_in(folder: Path, more: str = " more", count: int = 24) -> Path:
    """A file of examples of two classes, of unlike lengths."""
    path = folder / "train.tsv"
    rows = [f"{'good' if n % 2 else 'bad'}\tsentence number {n}{more * (n % 5)}\n" for n in range(count)]
    path.write_text("".join(rows))
    return path


def paragraphs_in(folder: Path, count: int) -> Path:
    """A file of so many paragraphs."""
    path = folder / "text.txt"
    path.write_text("".join(f"this is paragraph number {n} of a text that goes on and on\n\n" for n in range(count)))
    return path


def flags(**options: object) -> list[str]:
    """Options of the command by the names of settings."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def ended(*words: object) -> int:
    """The exit code of a command, whether it returns it or its parser leaves with it."""
    try:
        return command_line.main([str(word) for word in words])
    except SystemExit as error:
        return error.code


def train(data: Path | str, model: Path | str, output: Path, *more: str, **options: object) -> int:
    """Two steps, unless told otherwise; the exit code."""
    given = {
        "train": data, "model": model, "output": output, "batch_size": 4, "length": 16, "log_every": 1, "steps": 2,
        "learning_rate": 1e-3, **options,
    }  # fmt: skip
    return command_line.main(["train", *flags(**given), *more])


def refused(capsys, code: int, expected: int = 2) -> str:
    """The one line on stderr of a command that ended with the code."""
    error = capsys.readouterr().err
    assert code == expected, error
    assert error.count("\n") == 1, error
    return error
