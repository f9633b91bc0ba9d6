"""Small files of GLUE tasks and named entities, in their published formats."""

from pathlib import Path


def task_files(folder: Path, train: str, dev: str, dev_name: str = "dev.tsv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.tsv").write_text(train, encoding="utf-8", newline="")
    (folder / dev_name).write_text(dev, encoding="utf-8", newline="")
    return folder


def cola_files(folder: Path, count: int = 24) -> Path:
    rows = "".join(
        f"gj04\t{index % 3 > 0:d}\t{'*' if index % 3 == 0 else ''}\tSentence number {index}.\n"
        for index in range(count)
    )
    return task_files(folder, rows, rows)


def ner_files(folder: Path, count: int = 12) -> Path:
    rows = "".join(
        f"Patient\tO\nnumber{index}\tO\nhas\tO\nhepatitis\tB-Disease\nB\tI-Disease\n\n" for index in range(count)
    )
    return task_files(folder, rows, rows, "devel.tsv")
