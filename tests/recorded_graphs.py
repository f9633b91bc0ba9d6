"""What a CUDA graph does, on the CPU: operations recorded with their tensors, and run again on the same memory.

As in a CUDA graph, recording freezes whatever the host decides, reads and writes the same addresses at every replay,
and what a replay computes lies where the recording put it. (Unlike there, recording also computes; what it wrote to
memory that existed before is put back.)
"""

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from alum_kernels.adversarial.cuda_graphs import CaptureError

HOST = ("_local_scalar_dense", "nonzero.default", "is_nonzero", "equal.default")


class WaitsError(CaptureError):
    """An operation that the host waits for, which no capture allows."""


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Tape(TorchDispatchMode):
    """Every operation, in order, as something that does it again in place."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Callable[[], None]] = []
        self._kept: list[object] = []  # so that no address is used twice
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(name in str(func) for name in HOST):
            raise WaitsError(f"operation not permitted when stream is capturing: {func}")
        given = _tensors((args, kwargs))
        for tensor in given:
            self._remember(tensor)
        held = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        found = func(*args, **kwargs)
        addresses = {_address(tensor) for tensor in given}
        targets = [result.detach() for result in _tensors(found)]
        fresh = [_address(target) not in addresses for target in targets]
        self._made |= {_address(target) for target, is_fresh in zip(targets, fresh, strict=True) if is_fresh}
        self._kept += [held, targets, found]

        def again() -> None:
            results = _tensors(func(*held[0], **held[1]))
            for target, result, is_fresh in zip(targets, results, fresh, strict=True):
                if is_fresh:
                    target.copy_(result)

        self.entries.append(again)
        return found

    def _remember(self, tensor: Tensor) -> None:
        """Memory from before the recording, as it was."""
        storage = tensor.untyped_storage()
        if storage.nbytes() and _address(tensor) not in self._made and _address(tensor) not in self._before:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._before[_address(tensor)] = (whole, whole.clone())

    def undo(self) -> None:
        for whole, copy in self._before.values():
            whole.copy_(copy)


class _States:
    """The state of the CPU's generator at the beginning of a replay, for passes that draw again from there."""

    def __init__(self, tape: _Tape, begin: list[Tensor], passes: int) -> None:
        self._tape, self._begin, self.left = tape, begin, passes
        self._now = torch.get_rng_state()

    def restore(self) -> None:
        assert self.left > 0, "a pass repeats masks for which no generator was registered"
        self.left -= 1
        torch.set_rng_state(self._now)
        self._tape.entries.append(lambda: torch.set_rng_state(self._begin[0]))


class RecordedGraphs:
    """Stands in for ``CudaGraphs``."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def obstacle(self, device: torch.device) -> str | None:
        return None

    def warm(self, body: Callable[[], None]) -> None:
        body()

    def record(self, body: Callable[[_States], None], passes: int) -> Callable[[], None]:
        tape, begin, rng = _Tape(), [torch.empty(0)], torch.get_rng_state()
        states = _States(tape, begin, passes)
        # transformers asks, so as to read no mask in a capture
        with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True), tape:
            body(states)
        assert states.left == 0, "a generator was registered for a pass that there is not"
        with torch.no_grad():
            tape.undo()
        torch.set_rng_state(rng)
        self.recorded += 1

        def replay() -> None:
            begin[0] = torch.get_rng_state()
            self.replayed += 1
            with torch.no_grad():
                for again in tape.entries:
                    again()

        return replay
