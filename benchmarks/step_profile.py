"""Where the time of one step goes: the model's own passes, the library's ops, the rest. From one profiled call.

    model      what runs within the model's forward, and the backward of the nodes made there; gradients added up at
               parameters
    library    ops named alum_kernels::*, with everything under them, in whichever pass. A linear head's divergence is
               one of them, with its products
    rest       losses outside the model, the draw of seeds, Python between passes

On the CPU these are shares of the call's wall time; on CUDA, of the time of the kernels, each counted with the op that
launched it. Kernels of a replayed graph have no op: a captured step has no shares.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from .timing import Call, peak_of_profile

STEP = "benchmarks: step"
FORWARD = "benchmarks: forward of the model"
LIBRARY = "alum_kernels::"
NODE = "autograd::engine::evaluate_function: "
ACCUMULATION = NODE + "torch::autograd::AccumulateGrad"
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchCooperativeKernel", "cudaGraphLaunch")
"""How the names of the host's calls begin that start a kernel, or a graph of them."""


@dataclass(frozen=True)
class StepProfile:
    """Shares in [0, 1]; ``peak_bytes`` on the CPU and ``launches`` on CUDA only."""

    model_share: float | None
    library_share: float | None
    launches: int | None
    peak_bytes: int | None


@contextmanager
def _watched(model: nn.Module, nodes: list[range]) -> Iterator[None]:
    """Within the context each forward of the model is a named range, and ``nodes`` receives the autograd nodes it made.

    In the place where ``nn.Module.compile`` puts its function, the outermost one that a call reaches: hooks would be
    compiled.
    """
    compiled = vars(model).get("_compiled_call_impl")
    forward: Callable[..., Any] = model._call_impl if compiled is None else compiled

    def named(*args: Any, **kwargs: Any) -> Any:
        first = torch.autograd._get_sequence_nr()
        with record_function(FORWARD):
            outputs = forward(*args, **kwargs)
        nodes.append(range(first, torch.autograd._get_sequence_nr()))
        return outputs

    model._compiled_call_impl = named
    try:
        yield
    finally:
        if compiled is None:
            del model._compiled_call_impl
        else:
            model._compiled_call_impl = compiled


def profile_step(call: Call, model: nn.Module, device: torch.device, *, shares: bool = True) -> StepProfile:
    """Profile one call of a step.

    Args:
        call: the step.
        model: the one that it trains, on ``device``.
        device: of the model.
        shares: False leaves them out, for a graph that is replayed.
    """
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    nodes: list[range] = []
    with _watched(model, nodes), profile(activities=activities, profile_memory=not on_cuda) as profiled:
        with record_function(STEP):
            result = call()
        if on_cuda:
            torch.cuda.synchronize(device)
    del result
    events = profiled.events()
    found = _shares(events, nodes, on_cuda) if shares else (None, None)
    launches = sum(event.name.startswith(LAUNCHES) for event in events) if on_cuda else None
    return StepProfile(*found, launches, None if on_cuda else peak_of_profile(profiled))


def _shares(events: list[FunctionEvent], nodes: list[range], on_cuda: bool) -> tuple[float, float]:
    """Of the model and of the library."""
    owners: dict[int, str] = {}

    def owner(event: FunctionEvent) -> str:
        if id(event) not in owners:
            owners[id(event)] = _owner(event, nodes, "" if event.cpu_parent is None else owner(event.cpu_parent))
        return owners[id(event)]

    microseconds = {"": 0.0, "model": 0.0, "library": 0.0}
    whole = 0.0
    for event in events:
        if event.device_type != DeviceType.CPU:
            if not event.is_user_annotation:
                whole += event.time_range.elapsed_us()
            continue
        if event.name == STEP and not on_cuda:
            whole = event.cpu_time_total
        microseconds[owner(event)] += (
            sum(kernel.duration for kernel in event.kernels) if on_cuda else event.self_cpu_time_total
        )
    return microseconds["model"] / whole, microseconds["library"] / whole


def _owner(event: FunctionEvent, nodes: list[range], parents: str) -> str:
    if parents == "library" or event.name.startswith(LIBRARY):
        return "library"
    if event.name == FORWARD or event.name == ACCUMULATION:
        return "model"
    if event.name.startswith(NODE):
        return "model" if any(event.sequence_nr in made for made in nodes) else ""
    return parents
