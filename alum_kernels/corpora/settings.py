"""A mapping of settings from YAML or JSON, with the line of whatever is wrong in it."""

import json
import re
from pathlib import Path
from typing import Any

from alum_kernels.corpora.json_text import DuplicateKeyError, kind_of, parse_json
from alum_kernels.corpora.text import CorpusError, line_of, read_text, reader_for


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping that a file holds.

    ``*.yaml`` and ``*.yml`` are read with PyYAML's safe loader (YAML 1.1), ``*.json`` as JSON. A key may stand once in
    its mapping, and those of the file are strings.

    Raises:
        CorpusError: the file cannot be used, or PyYAML is not installed; the message begins with the path and, where
            there is one, the line.

    Example:
        >>> import pathlib, tempfile
        >>> from alum_kernels.corpora import read_settings
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "settings.json")
        ...     _ = path.write_text('{"alpha": 1.0}')
        ...     read_settings(path)
        {'alpha': 1.0}
    """
    path = Path(path)
    reader = reader_for(path, {".yaml": _from_yaml, ".yml": _from_yaml, ".json": _from_json})
    return reader(path, read_text(path))


def _from_json(path: Path, text: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{path}:{error.lineno}: expected JSON, column {error.colno}: {error.msg}") from error
    except DuplicateKeyError as error:
        line = _line_of_second(text, error.key)
        raise CorpusError(f"{path}{'' if line is None else f':{line}'}: {error}") from error
    except ValueError as error:
        raise CorpusError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CorpusError(f"{path}:1: expected a mapping, got {kind_of(value)}")
    return value


def _line_of_second(text: str, key: str) -> int | None:
    """The line of a key's second place, if it stands in two places of the text and no more."""
    places = [found.start() for found in re.finditer(rf"(?<!\\){re.escape(json.dumps(key))}\s*:", text)]
    return line_of(text, places[1]) if len(places) == 2 else None


def _from_yaml(path: Path, text: str) -> dict[str, Any]:
    try:
        from alum_kernels.corpora.yaml_loader import YamlError, load_mapping
    except ImportError as error:
        raise CorpusError(f"{path}: reading YAML needs PyYAML: pip install pyyaml; or write it as JSON") from error
    try:
        return load_mapping(text)
    except YamlError as error:
        raise CorpusError(f"{path}:{error.line}: {error}") from error
