"""The layers below a perturbed hidden state: they run in the clean pass, and are skipped in the perturbed ones.

What they give is known from the clean pass, whose graph the last pass goes on from. Dropout's masks above them are
those of the clean pass, since the state of its generators is taken where the lowest layer above begins.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alum_kernels.adversarial.layers import layer_list
from alum_kernels.adversarial.model_state import RandomState, replaced_forwards
from alum_kernels.adversarial.sites import Site


class LowerLayers:
    """The first ``depth`` layers of a model; the input of the next one is the perturbed site.

    Args:
        model: the model, unwrapped.
        depth: number of layers, > 0.
        decoder: of an encoder-decoder, the decoder's.

    Attributes:
        site: the input of the layer above them.
        random: state of dropout's generators when that layer began in the last clean pass; None before there was one.

    Raises:
        ValueError: the model has no list of layers, or not that many.
    """

    def __init__(self, model: nn.Module, depth: int, *, decoder: bool = False) -> None:
        name = layer_list(model, decoder=decoder)
        if name is None:
            raise ValueError(f"ascent_depth: {type(model).__name__} has no list of layers")
        layers = list(model.get_submodule(name))
        if depth >= len(layers):
            raise ValueError(f"ascent_depth: expected less than the {len(layers)} layers of {name}, got {depth}")
        self.site = Site(f"{name}.{depth}", layers[depth], on_input=True, decoder=decoder)
        self.random: RandomState | None = None
        self._names = [f"{name}.{index}" for index in range(depth)]
        self._layers = layers[:depth]
        self._gives_tuple = [False] * depth
        self._watching: torch.device | None = None
        # one function a layer for every pass: a compiled model would take another one for another model
        self._passes_on = [partial(self._pass_on, index) for index in range(depth)]
        self._handles = [
            layer.register_forward_hook(partial(self._learn, index)) for index, layer in enumerate(self._layers)
        ]
        self._handles.append(self.site.module.register_forward_pre_hook(self._take_state))

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def watched(self, device: torch.device) -> Iterator[None]:
        """Within the context, a clean pass shows what the layers give.

        Raises:
            ValueError: from within, where a layer gives more than its hidden state, which later layers may read.
        """
        self._watching = device
        try:
            yield
        finally:
            self._watching = None

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Within the context the layers give what they are given."""
        with replaced_forwards(zip(self._layers, self._passes_on, strict=True)):
            yield

    def _pass_on(self, index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden,) if self._gives_tuple[index] else hidden

    def _take_state(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._watching is not None:
            self.random = RandomState(self._watching)

    def _learn(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._watching is None:
            return
        if isinstance(output, tuple) and any(part is not None for part in output[1:]):
            raise ValueError(
                f"ascent_depth: expected layers that give their hidden state alone, {self._names[index]} gives "
                f"{len(output)} values, which later layers may read"
            )
        self._gives_tuple[index] = isinstance(output, tuple)
