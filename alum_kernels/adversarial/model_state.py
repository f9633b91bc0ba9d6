"""What a step reads of a model and puts back: its place, its modules' modes, the state of dropout's generators."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``DistributedDataParallel``; any other module as it is.

    Raises:
        ValueError: the model is in ``DataParallel``.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "model: expected a module or DistributedDataParallel, got DataParallel, whose replicas carry no hooks; "
            "start one process a GPU with torchrun"
        )
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def original(model: nn.Module) -> nn.Module:
    """The module as it was written, whose submodules have their names: inside ``torch.compile`` too.

    Raises:
        ValueError: ``DistributedDataParallel`` was compiled, and cannot be told when to sum gradients.
    """
    inner = unwrap(model)
    written = getattr(inner, "_orig_mod", inner)
    if written is not unwrap(written):
        raise ValueError(
            "model: expected DistributedDataParallel around a compiled model, got a compiled DistributedDataParallel"
        )
    return written


def has_static_graph(model: nn.Module) -> bool:
    """Whether a model is in a ``DistributedDataParallel`` that takes every step for the same as the first."""
    return isinstance(model, nn.parallel.DistributedDataParallel) and model.static_graph


def recomputes_segments(model: nn.Module) -> bool:
    """Whether a backward runs parts of the model again, as gradient checkpointing of transformers does."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are.

    Raises:
        ValueError: the model has none.
    """
    for parameter in model.parameters():
        return parameter.device
    raise ValueError(f"model: expected parameters, {type(model).__name__} has none")


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Every submodule in evaluation mode within the context, each one's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def replaced_forwards(pairs: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Other forwards of some modules within the context; afterwards what was there, a patch of somebody's included."""
    pairs = list(pairs)
    before = [(module, vars(module).get("forward")) for module, _ in pairs]
    for module, forward in pairs:
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before:
            if own is None:
                del module.forward  # the class's is found again
            else:
                module.forward = own


def dropout_off_in_backward(model: nn.Module, loss: Tensor) -> None:
    """Every submodule in evaluation mode in the backward of ``loss`` too, which recomputes checkpointed segments."""

    def enter(grad: Tensor) -> None:
        off = dropout_off(model)
        off.__enter__()
        Variable._execution_engine.queue_callback(lambda: off.__exit__(None, None, None))

    loss.register_hook(enter)


class RandomState:
    """Snapshot of the default generators that dropout draws from: the CPU's and ``device``'s."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
