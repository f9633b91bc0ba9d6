"""How a model is perturbed: forward hooks at its sites, inert outside the passes of a step.

The hooks are installed once, before anybody compiles the model. A pass runs inside ``recording`` (the tensor at each
site is kept and stays as it is) or ``replacing`` (it is replaced); outside of both the hooks do nothing. Where the
tensor is known from a pass before, an embedding is not looked up again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alum_kernels.adversarial.model_state import replaced_forwards
from alum_kernels.adversarial.sites import Site

Replace = Callable[[int, Tensor], Tensor | None]
"""From the index of a site and the tensor there to what takes its place; None keeps it."""

_NOT_SEEN = (
    "name other modules in AdversarialConfig(modules=(...)). Where a model of the same class was compiled before this "
    "one was wrapped, its code is used again and sees no hooks: set torch._dynamo.config.skip_nnmodule_hook_guards = "
    "False before it is compiled"
)


class SiteError(Exception):
    """A site that a pass does not perturb as asked: another one must be named."""


class SiteTypeError(SiteError, TypeError):
    """What is there is no tensor that can be perturbed."""


class SiteRunError(SiteError, RuntimeError):
    """It did not run exactly once in a forward pass."""


class PerturbationHooks:
    """Forward hooks at the perturbed sites of one model."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = tuple(sites)
        self.names = tuple(site.name for site in sites)
        self._replace: Replace | None = None
        self._known: Sequence[Tensor] | None = None
        self._looked_up: tuple[Tensor, Tensor] | None = None
        # one function for every pass: a compiled model would take another one for another model
        self._give_embeddings = self._give_looked_up
        self._lookups = [
            (site.module, partial(self._known_tensor, index))
            for index, site in enumerate(self.sites)
            if type(site.module) is nn.Embedding and not site.on_input
        ]
        self._used = False
        self._calls = [0] * len(self.sites)
        self._handles = [
            site.module.register_forward_pre_hook(partial(self._on_input, index))
            if site.on_input
            else site.module.register_forward_hook(partial(self._on_output, index))
            for index, site in enumerate(self.sites)
        ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _on_output(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        return self._replaced(index, output)

    def _on_input(self, index: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        replaced = self._replaced(index, args[0] if args else None)
        return None if replaced is None else (replaced, *args[1:])

    def _replaced(self, index: int, tensor: Any) -> Tensor | None:
        if self._replace is None:
            if self._used and torch._C._current_graph_task_id() != -1:
                raise SiteRunError(
                    f"{self.names[index]}: ran again inside a backward, so it lies in a checkpointed segment, which is "
                    "recomputed without the perturbation; name modules outside in AdversarialConfig(modules=(...))"
                )
            return None
        if not isinstance(tensor, Tensor) or tensor.dim() != 3 or not tensor.is_floating_point():
            came = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            end = "input" if self.sites[index].on_input else "output"
            raise SiteTypeError(
                f"{self.names[index]}: expected a floating-point (B, S, H) {end} to perturb, got {came}"
            )
        self._calls[index] += 1
        return self._replace(index, tensor if self._known is None else self._known[index])

    def _known_tensor(self, index: int, *args: Any, **kwargs: Any) -> Tensor:
        return self._known[index]

    def look_up(self, ids: Any) -> Tensor | None:
        """The embeddings of token ids (B, S), where the one site is a plain embedding of them; None elsewhere."""
        module = self.sites[0].module
        plain = len(self._lookups) == len(self.sites) == 1 and "forward" not in vars(module)
        return module(ids) if plain and isinstance(ids, Tensor) and ids.dim() == 2 else None

    @contextmanager
    def looked_up(self, ids: Tensor, embeds: Tensor) -> Iterator[None]:
        """Within the context the site, where it is given these very ids, gives these embeddings of theirs."""
        self._looked_up = (ids, embeds)
        try:
            with replaced_forwards([(self.sites[0].module, self._give_embeddings)]):
                yield
        finally:
            self._looked_up = None

    def _give_looked_up(self, given: Tensor) -> Tensor:
        ids, embeds = self._looked_up
        return embeds if given is ids else nn.Embedding.forward(self.sites[0].module, given)

    @contextmanager
    def replacing(self, replace: Replace, known: Sequence[Tensor] | None = None) -> Iterator[None]:
        """Within the context, ``replace(index, tensor)`` takes the place of the tensor at each site (None keeps it).

        ``known`` are these tensors, of each site: the pass's own are not used then, and embeddings not looked up.
        """
        self._replace, self._known = replace, known
        self._used = True
        self._calls = [0] * len(self.names)
        try:
            with replaced_forwards([] if known is None else self._lookups):
                yield
        finally:
            self._replace = self._known = None

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Within the context tensors stay as they are; the list receives that at each site, part of the graph.

        The model goes on with copies, which it may change in place.

        Raises:
            RuntimeError: at the end of the context, if a module did not run exactly once.
        """
        recorded: list[Tensor] = [torch.empty(0)] * len(self.names)

        def keep(index: int, tensor: Tensor) -> Tensor:
            recorded[index] = tensor
            return tensor.clone()

        with self.replacing(keep):
            yield recorded
        self.check_calls()

    def check_calls(self) -> None:
        """Raises RuntimeError, naming the module, unless each ran exactly once in the last pass."""
        for name, calls in zip(self.names, self._calls, strict=True):
            if calls != 1:
                raise SiteRunError(
                    f"{name}: expected to run exactly once in a forward pass, ran {calls} times; "
                    + (_NOT_SEEN if calls == 0 else "name other modules in AdversarialConfig(modules=(...))")
                )
