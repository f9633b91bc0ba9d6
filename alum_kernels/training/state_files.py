"""Nested state as two files: tensors as safetensors, everything else as JSON. Nothing is ever executed to read them.

A tensor is replaced by ``{"tensor": name}``, a tuple by ``{"tuple": [...]}``, and a mapping, whose keys need not be
text, by ``{"items": [[key, value], ...]}``. Floats come back bit for bit: JSON gets their shortest exact digits.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TENSORS, REST = "training.safetensors", "training.json"


def write_state(folder: Path, state: Any) -> None:
    """Write both files; tensors of any device and dtype, numbers, text, None, lists, tuples and mappings.

    Raises:
        TypeError: something else is in it.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    rest = _without_tensors(state, "state", tensors)
    save_file(tensors, folder / TENSORS)
    (folder / REST).write_text(json.dumps(rest) + "\n", encoding="utf-8")


def read_state(folder: Path) -> Any:
    """What :func:`write_state` wrote, with tensors on the CPU."""
    from safetensors.torch import load_file

    # clones lie where the allocator aligns them, as those of a run that was never stopped
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
    return _with_tensors(json.loads((folder / REST).read_text(encoding="utf-8")), tensors)


def _without_tensors(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[place] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": place}
    if isinstance(value, dict):
        return {"items": [[key, _without_tensors(part, f"{place}.{key}", tensors)] for key, part in value.items()]}
    if isinstance(value, list | tuple):
        parts = [_without_tensors(part, f"{place}.{number}", tensors) for number, part in enumerate(value)]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{place}: expected tensors, numbers, text, lists and mappings, got {type(value).__name__}")


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_with_tensors(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_with_tensors(part, tensors) for part in content)
    return {key: _with_tensors(part, tensors) for key, part in content}
