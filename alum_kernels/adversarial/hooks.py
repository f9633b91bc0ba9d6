"""Where a model is perturbed: forward hooks on the embeddings, inert outside the passes of a step.

The hooks are installed once, before anybody compiles the model. A pass runs inside ``recording`` (the output is kept
and stays as it is) or ``replacing`` (the output is replaced); outside of both the hooks do nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``DistributedDataParallel``; any other module as it is."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are.

    Raises:
        ValueError: the model has none.
    """
    for parameter in model.parameters():
        return parameter.device
    raise ValueError(f"model: expected parameters, {type(model).__name__} has none")


def perturbed_modules(model: nn.Module, names: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The modules to perturb, by name.

    Args:
        model: the model, unwrapped.
        names: as in ``model.named_modules()``; empty means the input embeddings. Those of an encoder-decoder are its
            encoder's ``embed_tokens``: on T5 and BART ``get_input_embeddings()`` is a module that is never called.

    Raises:
        ValueError: a name that does not exist, or a model without input embeddings.
    """
    everything = dict(model.named_modules(remove_duplicate=False))
    if names:
        for name in names:
            if name not in everything:
                raise ValueError(f"modules: {type(model).__name__} has no module named {name!r}")
        return {name: everything[name] for name in names}
    found = None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        found = getattr(model.get_encoder(), "embed_tokens", None)
    elif callable(getattr(model, "get_input_embeddings", None)):
        found = model.get_input_embeddings()
    if found is None:
        raise ValueError(
            f"model: {type(model).__name__} has no input embeddings to perturb; "
            "name the modules in AdversarialConfig(modules=(...))"
        )
    named = [name for name, module in everything.items() if module is found]
    return {named[-1] if named else "input embeddings": found}


class PerturbationHooks:
    """Forward hooks on the perturbed modules of one model."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.names = tuple(modules)
        self._replace: Callable[[int, Tensor], Tensor | None] | None = None
        self._used = False
        self._calls = [0] * len(self.names)
        self._handles = [
            module.register_forward_hook(partial(self._hook, index)) for index, module in enumerate(modules.values())
        ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        if self._replace is None:
            if self._used and torch._C._current_graph_task_id() != -1:
                raise RuntimeError(
                    f"{self.names[index]}: ran again inside a backward, so it lies in a checkpointed segment, which is "
                    "recomputed without the perturbation; name modules outside in AdversarialConfig(modules=(...))"
                )
            return None
        if not isinstance(output, Tensor) or output.dim() != 3 or not output.is_floating_point():
            came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f"{self.names[index]}: expected a floating-point (B, S, H) output to perturb, got {came}")
        self._calls[index] += 1
        return self._replace(index, output)

    @contextmanager
    def replacing(self, replace: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
        """Within the context, ``replace(index, output)`` takes the place of each module's output (None keeps it)."""
        self._replace = replace
        self._used = True
        self._calls = [0] * len(self.names)
        try:
            yield
        finally:
            self._replace = None

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Within the context outputs stay as they are; the list receives a detached copy of each module's.

        Raises:
            RuntimeError: at the end of the context, if a module did not run exactly once.
        """
        recorded: list[Tensor] = [torch.empty(0)] * len(self.names)

        def keep(index: int, output: Tensor) -> None:
            recorded[index] = output.detach().clone()

        with self.replacing(keep):
            yield recorded
        for name, calls in zip(self.names, self._calls, strict=True):
            if calls != 1:
                raise RuntimeError(
                    f"{name}: expected to run exactly once in a forward pass, ran {calls} times; "
                    "name other modules in AdversarialConfig(modules=(...))"
                )


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
