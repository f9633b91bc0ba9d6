"""Heads whose vocabulary is split over ranks: a process group or a DTensor weight says how, and the ranks must agree.

A DTensor is taken apart here: what is behind it is plain tensors, the slice of this rank, and a process group. Its
gradient finds the way back by itself, with the placement of the DTensor.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from alum_kernels.backends.vocabulary_group import VocabularySplit, gathered
from alum_kernels.ops.checks import check_process_group, is_dtensor

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh, ProcessGroup
    from torch.distributed.tensor import DTensor

EAGER = "its ranks send each other tensors and sizes, which a traced graph does not hold"
"""Why a split head is not compiled."""


class LocalHead(NamedTuple):
    """A head as one rank has it, in plain tensors."""

    hidden: tuple[Tensor, ...]  # the same on every rank
    weight: Tensor  # (V_r, H)
    bias: Tensor | None  # (V_r,)
    group: ProcessGroup | None  # None: the weight is whole
    sizes: tuple[int, ...] | None  # classes of each rank where all is known without asking the ranks


def is_split(weight: Tensor, group: ProcessGroup | None) -> bool:
    """Whether the ranks have a say in a call, or DTensors do."""
    return group is not None or is_dtensor(weight)


def local_head(
    hidden: Sequence[tuple[str, Tensor]], weight: Tensor, bias: Tensor | None, group: ProcessGroup | None
) -> LocalHead:
    """The plain tensors of this rank, from plain tensors and a group or from DTensors.

    Args:
        hidden: names and hidden states (..., H), the same on every rank: plain, or DTensors with placement Replicate.
        weight: (V_r, H) with a group; a DTensor (V, H) without.
        bias: (V_r,), or a DTensor (V,) placed as the weight; or None.
        group: the ranks that hold slices.

    Raises:
        TypeError, ValueError: the message names the argument, what it was and what would serve.
    """
    if is_dtensor(weight):
        return _from_dtensors(hidden, weight, bias, group)
    for name, tensor in (*hidden, ("bias", bias)):
        if is_dtensor(tensor):
            raise TypeError(f"{name}: expected a plain tensor as weight is, got a DTensor; {name}.to_local() gives one")
    states = tuple(tensor for _, tensor in hidden)
    if group is None:
        return LocalHead(states, weight, bias, None, None)
    check_process_group("group", group)
    if torch.distributed.get_world_size(group) == 1:
        group = None
    return LocalHead(states, weight, bias, group, None)


def _from_dtensors(
    hidden: Sequence[tuple[str, Tensor]], weight: DTensor, bias: Tensor | None, group: ProcessGroup | None
) -> LocalHead:
    if group is not None:
        raise ValueError("group: expected None with a DTensor weight, whose mesh has its own, got a process group")
    mesh, placements = weight.device_mesh, weight.placements
    axis = _split_axis(weight)
    if bias is not None and not is_dtensor(bias):
        raise TypeError("bias: expected a DTensor as weight is, got a plain tensor; distribute_tensor makes one of it")
    if bias is not None and (bias.device_mesh != mesh or bias.placements != placements):
        raise ValueError(
            f"bias: expected mesh and placements {placements} of weight, got {bias.placements} on {bias.device_mesh}; "
            "bias.redistribute(mesh, placements) moves it"
        )
    declared = all(is_dtensor(tensor) for _, tensor in hidden)
    states = tuple(_replica(name, tensor, weight) for name, tensor in hidden)
    local = weight.to_local(), None if bias is None else bias.to_local()
    if axis is None or mesh.size(axis) == 1:
        return LocalHead(states, *local, None, None)
    if not declared and mesh.size() != mesh.size(axis):
        name = next(name for name, tensor in hidden if not is_dtensor(tensor))
        raise ValueError(
            f"{name}: expected a DTensor, Replicate on every dimension, beside a weight on the mesh {mesh} of several "
            f"dimensions, got a plain tensor; or pass weight.to_local() with group=mesh.get_group({axis})"
        )
    return LocalHead(states, *local, mesh.get_group(axis), _sizes(weight, axis) if declared else None)


def _sizes(weight: DTensor, axis: int) -> tuple[int, ...]:
    """Classes of each rank, dealt out as torch.chunk does: ceil(V / R) each while there are any."""
    ranks, classes = weight.device_mesh.size(axis), weight.shape[0]
    most = -(-classes // ranks)
    return tuple(min(most, max(classes - rank * most, 0)) for rank in range(ranks))


def class_split(weight: DTensor) -> tuple[DeviceMesh, int, tuple[int, ...]]:
    """Mesh and dimension over which the classes of a DTensor weight (V, H) are split, and those of each rank.

    Raises:
        ValueError: it is placed in another way, or every rank has it whole.
    """
    axis = _split_axis(weight)
    if axis is None:
        raise ValueError(f"weight: expected a DTensor with placement Shard(dim=0), got {weight.placements}")
    return weight.device_mesh, axis, _sizes(weight, axis)


def _split_axis(weight: DTensor) -> int | None:
    """The dimension of the mesh over which the classes are split, None for a weight that every rank has whole."""
    from torch.distributed.tensor import Replicate, Shard

    split = [axis for axis, placement in enumerate(weight.placements) if type(placement) is not Replicate]
    if not split:
        return None
    placement = weight.placements[split[0]]
    if len(split) > 1 or type(placement) is not Shard or placement.dim != 0:
        raise ValueError(
            "weight: expected a DTensor with placement Replicate(), or Shard(dim=0) on one dimension of its mesh, "
            f"got {weight.placements}; weight.redistribute(placements=...) gives that, weight.full_tensor() the whole"
        )
    return split[0]


def _replica(name: str, tensor: Tensor, weight: DTensor) -> Tensor:
    """Plain hidden states that every rank has."""
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    if tensor.device_mesh != weight.device_mesh:
        raise ValueError(f"{name}: expected the mesh of weight, {weight.device_mesh}, got {tensor.device_mesh}")
    if any(type(placement) is not Replicate for placement in tensor.placements):
        raise ValueError(
            f"{name}: expected placement Replicate() on every dimension, got {tensor.placements}; "
            f"{name}.redistribute(placements=[Replicate()]) gives that"
        )
    return tensor.to_local()


def as_given(result: Tensor, given: Tensor) -> Tensor:
    """A replicated result as a DTensor where ``given``, of the same shape, was one."""
    if not is_dtensor(given):
        return result
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(result, given.device_mesh, given.placements, run_check=False)


def agreed_split(head: LocalHead, replicated: Sequence[tuple[str, Tensor | None]], options: Any) -> VocabularySplit:
    """How the classes are split, after a look at whether the ranks make the same call. The host waits once for it.

    DTensors say all that by themselves: then nothing is sent, and the host does not wait.

    Args:
        head: with a group.
        replicated: names and tensors that must be the same to the bit: hidden states that differ in their last digits
            differ by much more in what was added to them.
        options: what the call is, of any type with a ``repr``.

    Raises:
        ValueError: the ranks differ, on every rank; or they have no class.
    """
    sizes = head.sizes
    if sizes is None:
        first = head.hidden[0]
        known = [head.weight.shape[0], zlib.crc32(repr((first.shape, options)).encode())]
        told = torch.tensor(known + [0] * len(replicated), device=first.device)
        for at, (_, tensor) in enumerate(replicated, start=len(known)):
            if tensor is not None:
                told[at] = _bits(tensor)
        everywhere = gathered(told, head.group).tolist()
        for at, name in enumerate(("hidden and options", *(name for name, _ in replicated)), start=1):
            found = [values[at] for values in everywhere]
            if len(set(found)) > 1:
                own = found[torch.distributed.get_rank(head.group)]
                others = [rank for rank, value in enumerate(found) if value != own]
                raise ValueError(
                    f"{name}: expected the same on every rank of the group, got others on ranks {others} than here; a "
                    "weight that fully_shard splits is no split head, but whole in forwards of its module"
                )
        sizes = tuple(values[0] for values in everywhere)
    if sum(sizes) == 0:
        raise ValueError("weight: expected at least one class on some rank of the group, got none")
    return VocabularySplit(head.group, sizes)


def _bits(tensor: Tensor) -> Tensor:
    """A sum over the bits of a tensor and their places, which other values or another order all but never share."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    table = tensor.detach().contiguous().view(words)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for axis in range(table.dim()):
        others = [other for other in range(table.dim()) if other != axis]
        along = table.sum(others, dtype=torch.int64) if others else table
        total += (along * torch.arange(1, len(along) + 1, device=tensor.device) * (2 * axis + 1)).sum()
    return total
