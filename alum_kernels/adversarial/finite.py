"""Whether a step is finite: a guard between the backward of a step and the optimizer's.

One NaN in a gradient makes every parameter that the optimizer updates NaN, for good. The guard looks at the largest
element of all gradients and at the losses that it was shown, in one reduction and with one reading of the host; where
they are not finite it takes the gradients away, and an optimizer passes over parameters without one.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils import get_total_norm

from alum_kernels.ops.checks import check_count, check_process_group
from alum_kernels.ops.split_head import is_dtensor

MOST_NAMES = 3
"""Names of one kind that a message lists."""

Source = nn.Module | Iterable[Tensor]
"""A model, or parameters."""


class NonFiniteError(RuntimeError):
    """Too many steps in a row that were not finite; the message says what was not in the last one."""


class FiniteGuard:
    """Leaves out the optimizer steps whose gradients or losses are not finite, and stops where they do not end.

    A step that is left out is counted, and the first one warns with what was not finite: a loss, gradients by the
    names of their parameters, parameters, inputs. Nothing is left out silently, and no figure becomes 0.

    Call :meth:`allows` after the backward and before gradients are clipped (which spreads a NaN over all of them).
    Where it is false the gradients are None, so that the optimizer's step changes nothing: neither parameters nor its
    own averages. Batch statistics and schedules, which do not go by gradients, go on.

    With a ``torch.amp.GradScaler``, unscale first and pass it; its ``step`` and ``update`` are called in any case. An
    overflow of fp16 gradients is the scaler's to skip, which lowers its scale: it is neither counted here nor warned
    of as long as the scale is above 1 and the losses are finite.

    A captured step is guarded if it was captured without its optimizer.

    Under several processes the decision is the same on all of them: one all-reduce of one element a step. Of a model
    that ``fully_shard`` splits, each looks at its own shards.

    Args:
        patience: so many steps in a row that are not finite raise.
        group: of processes that decide together; None for all, where ``torch.distributed`` is initialised.

    Raises:
        TypeError, ValueError: no such number, or no process group.

    Attributes:
        skipped: steps that were left out so far.
        in_a_row: those since the last finite step.

    Example:
        >>> import torch
        >>> from alum_kernels import FiniteGuard
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer, guard = torch.optim.AdamW(model.parameters()), FiniteGuard(patience=10)
        >>> model(torch.tensor([[1.0, 2.0]])).sum().backward()
        >>> guard.allows(model)
        True
        >>> optimizer.step()
        >>> guard.skipped
        0
    """

    def __init__(self, patience: int = 10, *, group: "distributed.ProcessGroup | None" = None) -> None:
        self.patience = check_count("patience", patience, 1)
        check_process_group("group", group)
        self.group = group
        self.skipped = self.in_a_row = 0
        self._warned = False
        self._figures: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}

    def watch(self, figures: Mapping[str, Tensor], batch: Mapping[str, Any] | None = None) -> None:
        """Show figures of the step that :meth:`allows` decides next; once for each batch that is accumulated into it.

        Args:
            figures: scalars, such as :meth:`alum_kernels.AdversarialOutput.figures` or what
                :meth:`alum_kernels.AdversarialObjective.backward` returns. A step with one that is not finite is left
                out, also where its gradients are finite.
            batch: the model's arguments. Its floating-point tensors but masks are looked at where a step is left out.
        """
        for name, value in figures.items():
            value = _own(value.detach())
            # a sum is finite only if all of it is
            self._figures[name] = self._figures[name] + value if name in self._figures else value
        for name, value in (batch or {}).items():
            if isinstance(value, Tensor) and value.is_floating_point() and "mask" not in name:
                self._inputs[name] = value.detach()

    def allows(self, source: Source, *, scaler: torch.amp.GradScaler | None = None, drop: bool = True) -> bool:
        """Whether all gradients, and the figures shown since the last call, are finite. The host waits for one number.

        Args:
            source: the model, or its parameters.
            scaler: whose ``unscale_`` was called for these gradients; None for none.
            drop: set the gradients to None where they are not. False leaves that to :func:`drop_gradients`.

        Raises:
            NonFiniteError: it is the step number ``patience`` in a row that is not.
        """
        named = dict(_named(source))
        figures, inputs, self._figures, self._inputs = self._figures, self._inputs, {}, {}
        if self._finite(named, figures):
            self.in_a_row = 0
            return True
        lowers = scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1
        try:
            if not (lowers and self._agreed(_all_finite(figures.values()), named)):
                self._count(named, figures, inputs)
        finally:
            if drop:
                drop_gradients(named.values())
        return False

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs to go on counting."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take up a checkpoint: ``state`` is what :meth:`state_dict` gave."""
        self.skipped, self.in_a_row = int(state["skipped"]), int(state["in_a_row"])

    def _count(self, named: Mapping[str, Tensor], figures: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> None:
        self.skipped += 1
        self.in_a_row += 1
        if self._warned and self.in_a_row < self.patience:
            return
        found = _described(named, figures, inputs)
        if self.in_a_row >= self.patience:
            raise NonFiniteError(f"{self.in_a_row} optimizer steps in a row were not finite; in the last one: {found}")
        self._warned = True
        warnings.warn(
            f"an optimizer step is left out, since it is not finite: {found}. Later ones are counted without a "
            f"warning; {self.patience} in a row raise",
            stacklevel=3,
        )

    def _finite(self, named: Mapping[str, Tensor], figures: Mapping[str, Tensor]) -> bool:
        gradients = [dense for parameter in named.values() if (dense := _gradient(parameter)) is not None]
        largest = [get_total_norm(gradients, float("inf"))] if gradients else []
        return self._agreed(_all_finite([*largest, *figures.values()]), named)

    def _agreed(self, finite: Tensor | None, named: Mapping[str, Tensor]) -> bool:
        """Whether something is finite on every process, read by the host. None is something empty."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return finite is None or bool(finite)
        device = next((parameter.device for parameter in named.values()), torch.device("cpu"))
        flag = torch.ones((), dtype=torch.int32, device=device) if finite is None else finite.to(device, torch.int32)
        distributed.all_reduce(flag, distributed.ReduceOp.MIN, group=self.group)
        return bool(flag)


def drop_gradients(source: Source) -> None:
    """Set the gradients of a model, or of parameters, to None: an optimizer's step then changes nothing."""
    for _, parameter in _named(source):
        parameter.grad = None


def _named(source: Source) -> Iterator[tuple[str, Tensor]]:
    if isinstance(source, nn.Module):
        yield from source.named_parameters()
        return
    for index, parameter in enumerate([source] if isinstance(source, Tensor) else source):
        yield f"number {index} of shape {tuple(parameter.shape)}", parameter


def _gradient(parameter: Tensor) -> Tensor | None:
    """The gradient's numbers, where it has some."""
    grad = parameter.grad
    if grad is not None and grad.is_sparse:
        grad = grad.coalesce().values()
    grad = None if grad is None else _own(grad.detach())
    return None if grad is None or grad.numel() == 0 else grad


def _own(tensor: Tensor) -> Tensor:
    """What this process has of a DTensor: the others look at theirs, and all decide together."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def _all_finite(figures: Iterable[Tensor]) -> Tensor | None:
    """0-d bool on the device of the first; None of none."""
    figures = list(figures)
    if not figures:
        return None
    return torch.stack([figure.to(figures[0].device).reshape(()) for figure in figures]).isfinite().all()


def _described(named: Mapping[str, Tensor], figures: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> str:
    """What is not finite, of which the host reads all that it needs."""
    gradients = {name: grad for name, parameter in named.items() if (grad := _gradient(parameter)) is not None}
    losses = [f"{name} {float(value)}" for name, value in figures.items() if not bool(value.isfinite())]
    found = [
        ", ".join(losses),
        _listed("gradient", gradients),
        _listed("parameter", {name: _own(parameter.detach()) for name, parameter in named.items()}),
        _listed("input", inputs),
    ]
    return "; ".join(filter(None, found)) or "something on another process"


def _listed(kind: str, tensors: Mapping[str, Tensor]) -> str:
    """The first names of tensors that are not finite, and how many are; "" where all are."""
    wrong = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if not wrong:
        return ""
    more = f" and {len(wrong) - MOST_NAMES} more" if len(wrong) > MOST_NAMES else ""
    return f"{kind}s {', '.join(wrong[:MOST_NAMES])}{more} ({len(wrong)} of {len(tensors)})"
