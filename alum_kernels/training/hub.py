"""Data sets of the Hugging Face Hub, ``hub:NAME`` or ``hub:NAME:CONFIGURATION``."""

from typing import Any

from alum_kernels.corpora import CorpusError, Labelled

HUB = "hub:"
DEV_SPLITS = ("validation", "dev", "test")


def hub_splits(name: str) -> tuple[Any, Any]:
    """The training and the development split of a data set, ``name`` or ``name:configuration``.

    Raises:
        CorpusError: the package ``datasets`` is missing, the data set cannot be had, or it has no such splits.
    """
    try:
        import datasets
    except ImportError as error:
        raise CorpusError("a Hub data set needs the package datasets: pip install 'alum-kernels[hub]'") from error
    repository, _, configuration = name.partition(":")
    try:
        loaded = datasets.load_dataset(repository, configuration or None)
    except Exception as error:
        raise CorpusError(f"data set {name}: {error}") from error
    dev_name = next((split for split in DEV_SPLITS if split in loaded), None)
    if "train" not in loaded or dev_name is None:
        raise CorpusError(f"data set {name}: expected splits train and validation or test, got {', '.join(loaded)}")
    return loaded["train"], loaded[dev_name]


def text_columns(split: Any) -> list[str]:
    """Names of the columns of strings."""
    return [column for column, feature in split.features.items() if getattr(feature, "dtype", "") == "string"]


def hub_labelled(source: str, part: str, text: tuple[str, ...], label: str) -> Labelled:
    """Labelled texts of one part, with the names of classes where the data set has them; unlabelled rows are left out.

    Args:
        source: with :data:`HUB` before the name.
        part: ``"train"`` or ``"dev"``.
        text: columns; empty takes the first one or two of strings.
        label: column; empty is ``label``.

    Raises:
        CorpusError: as of :func:`hub_splits`, or there are no such columns.
    """
    name = source.removeprefix(HUB)
    split = hub_splits(name)[part == "dev"]
    columns, label = list(text) or text_columns(split)[:2], label or "label"
    missing = [column for column in (*columns, label) if column not in split.features]
    if missing or not columns:
        raise CorpusError(
            f"data set {name}: expected a column {label} and one or two of text, got {', '.join(split.features)}"
        )
    names = getattr(split.features[label], "names", None)
    rows = [
        (number, row) for number, row in enumerate(split) if row[label] is not None and not (names and row[label] < 0)
    ]
    return Labelled(
        [tuple(row[column] for column in columns) for _, row in rows],
        [str(names[row[label]] if names else row[label]) for _, row in rows],
        [f"{source} {part}:{number}" for number, _ in rows],
    )


def hub_paragraphs(source: str, part: str, text: tuple[str, ...]) -> list[str]:
    """Texts of one part that are not empty; the arguments are those of :func:`hub_labelled`."""
    name = source.removeprefix(HUB)
    split = hub_splits(name)[part == "dev"]
    columns = list(text) or text_columns(split)[:1]
    if not columns or any(column not in split.features for column in columns):
        raise CorpusError(f"data set {name}: expected a column of text, got {', '.join(split.features)}")
    return [row[column] for row in split for column in columns if row[column].strip()]
