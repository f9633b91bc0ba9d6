"""How a model is spread over processes, and what cannot be done with it then.

``DistributedDataParallel`` is seen through: all passes but one of a step go through the module inside. ``fully_shard``
(FSDP2) is part of the module itself, whose layers gather their parameters in every pass, so every rank must make the
same passes, and no pass may stop in the middle or use parameters from outside of a forward.

Whatever class is looked for can only be there if its package was imported, so none is imported here.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from alum_kernels.adversarial.config import AdversarialConfig
from alum_kernels.adversarial.model_state import original, unwrap
from alum_kernels.ops.checks import is_dtensor

GATHERED_IN_FORWARDS = "fully_shard gathers the weight of its output projection in forward passes only"
"""Why a caller's own loss cannot use the projection of a model that is fully sharded."""


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether ``torch.distributed.fsdp.fully_shard`` was applied to a model or to a part of it."""
    return any(True for _ in _units(model))


def class_as_written(module: nn.Module) -> type:
    """The class of a module before ``fully_shard`` made a subclass of it that is a unit."""
    unit = imported("torch.distributed.fsdp", "FSDPModule")
    return next(kind for kind in type(module).__mro__ if unit is None or not issubclass(kind, unit))


def mesh_of(model: nn.Module) -> Any:
    """The mesh over whose ranks ``fully_shard`` splits a model that :func:`check_parallelism` passed."""
    _units_at_rest(model)
    return next(parameter.device_mesh for _, parameter in _split_parameters(model))


@contextmanager
def casts_of_each_pass() -> Iterator[None]:
    """Within the context autocast keeps no weight that it cast: every pass casts its own.

    A cast that an earlier pass made gets its gradient when the backward has come down to that pass: after
    ``fully_shard`` reduced those of the layer, which would then count in the next step.
    """
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)


def check_parallelism(model: nn.Module, config: AdversarialConfig, ranks: int | None) -> None:
    """What no step is right with, or was ever tested with, by name.

    Args:
        model: as it is trained.
        config: the method.
        ranks: size of the process group that labels are counted over, None for no such group.

    Raises:
        ValueError: the model is distributed in another way than by ``DistributedDataParallel`` or ``fully_shard``, the
            method does not go with ``fully_shard``, or the model's gradients are averaged over other ranks.
    """
    _refuse_other_kinds(model)
    averaged = None
    if isinstance(model, nn.parallel.DistributedDataParallel):
        averaged = model.process_group.size()
        _refuse_split_replicas(model)
    elif is_fully_sharded(model):
        averaged = _shards(model)
        reason = _obstacle_of_sharding(config)
        if reason is not None:
            raise ValueError(f"model: expected DistributedDataParallel, or no fully_shard, for {reason}")
    else:
        _refuse_tensor_parallel_layers(original(model))
    if ranks is not None and averaged is not None and averaged != ranks:
        raise ValueError(
            f"process_group: expected the {averaged} ranks over which the model's gradients are averaged, got {ranks}"
        )


def _refuse_other_kinds(model: nn.Module) -> None:
    unwrap(model)  # DataParallel
    first = imported("torch.distributed.fsdp", "FullyShardedDataParallel")
    if first is not None and any(isinstance(module, first) for module in model.modules()):
        raise ValueError(
            "model: expected DistributedDataParallel or fully_shard, got FullyShardedDataParallel (FSDP1), whose flat "
            "parameters serve one forward before a backward, where a step has several; use "
            "torch.distributed.fsdp.fully_shard"
        )
    if any(kind.__module__.split(".")[0] == "deepspeed" for kind in type(model).__mro__):
        raise ValueError(
            f"model: expected DistributedDataParallel or fully_shard, got DeepSpeed's {type(model).__name__}, whose "
            "partitioned parameters and gradients were never tested with several forwards before a backward"
        )


def _refuse_split_replicas(model: nn.Module) -> None:
    """``DistributedDataParallel(device_mesh=...)`` makes DTensors of plain parameters within its own forward only."""
    name = next((name for name, parameter in model.named_parameters() if hasattr(parameter, "_st_info")), None)
    if name is not None:
        raise ValueError(
            f"model: expected DistributedDataParallel of whole parameters, got {name}, a part of a DTensor of tensor "
            "parallelism, which passes around DistributedDataParallel would take for the whole; split projections are "
            "trained without it"
        )


def _refuse_tensor_parallel_layers(model: nn.Module) -> None:
    """Tensor parallelism is seen through in the output projection only (``linear_head.py``)."""
    getter = getattr(model, "get_output_embeddings", None)
    projection = getter() if callable(getter) else None
    known = set() if projection is None else {id(parameter) for parameter in projection.parameters()}
    name = next((name for name, parameter in _split_parameters(model) if id(parameter) not in known), None)
    if name is not None:
        raise ValueError(
            "model: expected DistributedDataParallel, fully_shard, or tensor parallelism of the output projection "
            f"alone, got {name} split by it, which was never tested"
        )


def _obstacle_of_sharding(config: AdversarialConfig) -> str | None:
    """The method that does not go with ``fully_shard``, and why; None where it does."""
    if config.climbs_linearity:
        return f"{config.method}, which differentiates twice, when the parameters of the first backward are freed"
    if config.inner_steps:
        return "inner_steps > 0, whose passes stop after the first layer, with parameters gathered and not freed"
    if config.proximal > 0:
        return "proximal > 0, whose teacher's weights would be replaced by the gathered ones"
    if config.delta_lifetime > 1:
        return "delta_lifetime > 1, by which ranks make different numbers of passes, and would wait for each other"
    if config.ascent_dtype == "float8":
        return "ascent_dtype='float8', whose layers read their weights outside of what gathers them"
    return None


def _shards(model: nn.Module) -> int:
    """Over how many ranks ``fully_shard`` averages gradients.

    Raises:
        ValueError: parameters are split in another way as well.
    """
    held = {id(parameter) for unit in _units_at_rest(model) for parameter in unit.parameters()}
    meshes = []
    for name, parameter in _split_parameters(model):
        replicas = [placement.is_replicate() for placement in parameter.placements]
        if replicas not in ([False], [True, False]):  # shards, or replicas of shards
            raise ValueError(
                f"model: expected fully_shard alone, got {name} with placements {parameter.placements}, as of tensor "
                "parallelism, which was never tested"
            )
        if id(parameter) not in held:
            raise ValueError(
                f"model: expected fully_shard alone, got {name}, a DTensor that no unit of it holds, as of tensor "
                "parallelism, which was never tested"
            )
        meshes.append(parameter.device_mesh)
        if meshes[-1] != meshes[0]:
            raise ValueError(
                f"model: expected fully_shard over one mesh, got {name} on {meshes[-1]} beside {meshes[0]}, as of "
                "tensor parallelism, which was never tested"
            )
    if not meshes:
        raise ValueError("model: expected parameters that fully_shard splits, got none")
    return meshes[0].size()


def _units(model: nn.Module) -> Iterator[Any]:
    """The modules that ``fully_shard`` was applied to."""
    kind = imported("torch.distributed.fsdp", "FSDPModule")
    return iter(()) if kind is None else (module for module in model.modules() if isinstance(module, kind))


def _units_at_rest(model: nn.Module) -> list[Any]:
    """The same, their parameters split: a forward of the caller's may have left them gathered."""
    units = list(_units(model))
    for unit in units:
        unit.reshard()
    return units


def _split_parameters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and ``DTensor`` parameters."""
    return (pair for pair in model.named_parameters() if is_dtensor(pair[1]))


def imported(package: str, name: str) -> Any:
    """A class of a package, None if nothing has imported that."""
    return getattr(sys.modules.get(package), name, None)
