"""The first layer of a model, run without the rest of it: what YOPO's inner ascent steps go through."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from alum_kernels.adversarial.input_gradients import input_gradients
from alum_kernels.adversarial.layers import layer_list


class _Reached(Exception):  # noqa: N818 (control flow, no error)
    """Ends a forward pass at the first layer's output."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


class FirstLayer:
    """A forward hook on the module whose output ends the first layer.

    Args:
        model: the model, unwrapped.
        name: of the module, as in ``model.named_modules()``; its output is a tensor, or a tuple that begins with one.
            None takes the first entry of the longest list of modules that lies in no other list. A layer that runs
            several times, as ALBERT's, counts where it runs first.
        decoder: of an encoder-decoder, that list is one of the decoder, otherwise of the encoder.

    Raises:
        ValueError: there is no module of that name, or no list of modules to find one in.
    """

    def __init__(self, model: nn.Module, name: str | None = None, *, decoder: bool = False) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        if name is None:
            layers = layer_list(model, decoder=decoder)
            if layers is None:
                raise ValueError(
                    f"first_layer: {type(model).__name__} has no list of layers; name the module that ends its first "
                    "layer"
                )
            name = f"{layers}.0"
        if name not in modules:
            raise ValueError(f"first_layer: {type(model).__name__} has no module named {name!r}")
        self.name = name
        self._on_output: Callable[[Tensor], None] | None = None
        self._handle = modules[name].register_forward_hook(self._hook)

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()

    def with_gradient(self, forward: Callable[[], Any], gradients: list[Tensor]) -> Any:
        """What ``forward`` returns; its backward appends the gradient to the first layer's output to ``gradients``."""

        def watch(output: Tensor) -> None:
            output.register_hook(gradients.append)

        return self._run(forward, watch)

    def gradient(self, forward: Callable[[], Any], leaves: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
        """The gradient of ``upstream`` . (first layer's output) to the leaves; ``forward`` runs no further than that.

        Raises:
            ValueError: the pass ended without running the first layer, or the leaves do not reach it.
        """

        def stop(output: Tensor) -> None:
            raise _Reached(output)

        try:
            self._run(forward, stop)
        except _Reached as reached:
            grads = input_gradients(reached.output, list(leaves), upstream)
            if any(grad is None for grad in grads):
                raise ValueError(
                    f"first_layer: the output of {self.name} does not depend on the perturbation"
                ) from None
            return list(grads)
        raise ValueError(f"first_layer: {self.name} did not run in a forward pass")

    def _run(self, forward: Callable[[], Any], on_output: Callable[[Tensor], None]) -> Any:
        self._on_output = on_output
        try:
            return forward()
        finally:
            self._on_output = None

    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._on_output is not None:
            found = output[0] if isinstance(output, tuple) else output
            if not isinstance(found, Tensor):
                raise TypeError(f"first_layer: expected {self.name} to give a tensor, got {type(output).__name__}")
            self._on_output(found)
