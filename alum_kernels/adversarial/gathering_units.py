"""An output projection whose weight ``fully_shard`` splits, used where FSDP2 has gathered it: in one more forward.

    hidden states of a pass        leave the model from its inside, past the outputs whose backward gathers parameters
    divergence, cross-entropy      need the weight when the forward is over

Both become outputs of a method of each unit around the projection, the outermost first, which
``register_fsdp_forward_method`` has run as a forward. The hook before it gathers the parameters, and sends nothing
where they were kept. The hook after it frees them, and has the backward of the outputs gather them again: that of the
losses, and that of the hidden states, which goes on through the same units. The method takes no tensor: what it took
would end its units where the backward reaches it, in the middle of their layers. They end where the inputs of their own
forward do, or with the backward, and reduce their gradients then, those of a tied weight together.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from alum_kernels.adversarial.parallelism import imported, mesh_of

Result = TypeVar("Result")

_METHOD = "_with_gathered_parameters"


class GatheringUnits:
    """The units of ``fully_shard`` that hold an output projection, or part of the way to it.

    Args:
        model: as it is trained.
        projection: of this model.
    """

    def __init__(self, model: nn.Module, projection: nn.Module) -> None:
        kind = imported("torch.distributed.fsdp", "FSDPModule")
        self._units = [
            module
            for module in model.modules()
            if isinstance(module, kind) and any(part is projection for part in module.modules())
        ]
        self._projection, self._mesh, self._inside = projection, mesh_of(model), False

    def run(self, work: Callable[[], Result], hidden: Sequence[Tensor] = ()) -> Result:
        """What ``work`` returns, run where the parameters of the units are gathered. Every rank calls it alike.

        Args:
            work: gives tensors, or tuples and lists of some; their backward finds the parameters gathered.
            hidden: what the projection was given in a pass that is differentiated; likewise.
        """
        if self._inside:
            return work()
        self._inside = True
        try:
            for unit in reversed(self._units):
                # what a projection that is a unit itself was given comes from before it
                work = _as_forward(unit, work, () if unit is self._projection else hidden)
            return work()
        finally:
            self._inside = False

    def first_reason(self, reason: str | None, known: bool) -> tuple[str | None, bool]:
        """The reason of the first rank that has one, and whether any rank knows of its own. The host waits."""
        found = [(reason, known)]
        for axis in range(self._mesh.ndim):
            told: list[tuple[str | None, bool]] = [(None, False)] * self._mesh.size(axis)
            own = next((why for why, _ in found if why is not None), None), any(sure for _, sure in found)
            distributed.all_gather_object(told, own, group=self._mesh.get_group(axis))
            found = told
        return next((why for why, _ in found if why is not None), None), any(sure for _, sure in found)


def _as_forward(unit: nn.Module, work: Callable[[], Result], hidden: Sequence[Tensor]) -> Callable[[], Result]:
    """``work`` as a forward of one unit; what it returns as it is, whatever dtype the unit's outputs are cast to."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    def call() -> Result:
        results: list[Result] = []
        differentiated = torch.is_grad_enabled()

        def method() -> tuple[list[Result], Sequence[Tensor]]:
            with torch.set_grad_enabled(differentiated):
                results.append(work())
            return results, hidden

        setattr(unit, _METHOD, method)
        try:
            register_fsdp_forward_method(unit, _METHOD)
            with torch.enable_grad():  # hidden states have a backward even where the work has none
                getattr(unit, _METHOD)()
        finally:
            delattr(unit, _METHOD)
        return results[0]

    return call
