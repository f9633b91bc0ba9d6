"""A whole adversarial step as one CUDA graph: every pass, the fused ops and, if given, the optimizer.

The first steps of each shape run as they are, and train: they are what a capture needs to be warm. Then the step is
captured, which runs nothing, and from then on it is launched at once. A replay draws a new seed of the noise, and new
dropout masks: the clean pass draws from the default generator, each pass that repeats its masks from a generator of its
own that begins where the default one does.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from alum_kernels.adversarial.batch_shape import copied_batch, copy_into_batch, shape_of_batch
from alum_kernels.adversarial.config import AdversarialConfig
from alum_kernels.adversarial.cuda_graphs import CudaGraphs
from alum_kernels.adversarial.linear_head import LinearHead
from alum_kernels.adversarial.model_state import RandomState, device_of, recomputes_segments, unwrap
from alum_kernels.adversarial.output import AdversarialOutput
from alum_kernels.adversarial.parallelism import is_fully_sharded
from alum_kernels.adversarial.run import Draw, Plan, Samples, TaskOptions, Update
from alum_kernels.adversarial.step import RepeatedState
from alum_kernels.adversarial.telemetry import Telemetry

WARM_STEPS = 3
"""Steps of a shape before it is captured."""

MOST_GRAPHS = 8
"""Shapes that are captured; each holds its activations and gradients."""


class Objective(Protocol):
    """What is captured of an :class:`AdversarialObjective`."""

    model: nn.Module
    config: AdversarialConfig
    telemetry: Telemetry
    linear_head: LinearHead | None
    process_group: Any

    def backward(
        self,
        batch: Mapping[str, Any],
        scale: float | Tensor,
        *,
        update: Update | None,
        samples: Samples | None,
    ) -> dict[str, Tensor]:
        """A step as it runs."""

    def begin_step(self) -> Plan:
        """Count a step, and what the course of the training makes of it."""

    def draw_seed(self) -> Tensor:
        """The next seed of the noise."""

    def run_step(
        self,
        batch: Mapping[str, Any],
        plan: Plan,
        draw: Draw,
        options: TaskOptions,
        random: Callable[[torch.device], RepeatedState],
    ) -> AdversarialOutput:
        """A step as planned."""


class Graphs(Protocol):
    """What records work on a device and does it again; :class:`CudaGraphs`."""

    def obstacle(self, device: torch.device) -> str | None:
        """Why it cannot record on this device."""

    def warm(self, body: Callable[[], None]) -> None:
        """Run work as it will be recorded."""

    def record(self, body: Callable[[RepeatedState], None], passes: int) -> Callable[[], None]:
        """Record work without running it, and return what runs it.

        The state that ``body`` is given is restored by each of the ``passes`` that draw what the clean pass drew.
        """


@dataclass
class _Shape:
    """One shape of batch: its steps so far and, once captured, where a replay reads and writes."""

    steps: int = 0
    restores: int = 0
    replay: Callable[[], None] | None = None
    batch: Mapping[str, Any] | None = None
    seed: Tensor | None = None
    scale: Tensor | None = None
    figures: Tensor | None = None
    gradients: list[Tensor | None] | None = None
    counts: Counter[str] | None = None


class CapturedStep:
    """Called with a batch: a step, its backward and, if it has one, its optimizer's step, from one launch.

    Gradients are in ``.grad``, those of this step alone: they take the place of what was there, so nothing need be
    zeroed, and nothing accumulates. A batch's shapes choose its graph; ``pad_to_multiple_of`` of a tokenizer keeps them
    few. What is no tensor in a batch belongs to its shape. The same autocast as around :meth:`__call__` is captured.
    Whatever the host decides in a step is decided once; what a schedule changes on the device goes on changing.

    Where it is known that a step cannot be captured, every call runs it as it is, and a warning says why, once. What is
    known only in the capture raises.

    Parameters that are frozen or thawed, another state of the optimizer (a checkpoint's) or other constants of it make
    a new capture; another learning rate that is a number raises, since a schedule changes it in every step.

    Args:
        objective: the objective.
        example_batch: arguments of the model, labels included, as they will come.
        optimizer: ``SGD``, or one with ``capturable=True``; a learning rate that changes must be a tensor.
        graphs: what records; None takes CUDA graphs.

    Attributes:
        reason: why steps are not captured; None where they are.

    Raises:
        ValueError: a batch has something that cannot be told apart, or a learning rate changed.
        CaptureError: the model, the loss or the optimizer does what no capture allows.
    """

    def __init__(
        self,
        objective: Objective,
        example_batch: Mapping[str, Any],
        optimizer: torch.optim.Optimizer | None = None,
        *,
        graphs: Graphs | None = None,
    ) -> None:
        self._objective, self._optimizer = objective, optimizer
        device = device_of(unwrap(objective.model))
        self._graphs = CudaGraphs(device) if graphs is None else graphs
        self._shapes: dict[Hashable, _Shape] = {}
        self._rates = self._learning_rates()
        self._last_held, self._said_full = self._held(), False
        self.reason: str | None = None
        self._give_up(self._graphs.obstacle(device) or obstacle(objective, optimizer))
        shape_of_batch(example_batch)

    def __call__(
        self,
        batch: Mapping[str, Any],
        scale: float | Tensor = 1.0,
        *,
        update: Update | None = None,
        samples: Samples | None = None,
    ) -> dict[str, Tensor]:
        """One step.

        Args:
            batch: arguments of the model, labels included.
            scale: factor on the loss that is differentiated.
            update, samples: as of :meth:`AdversarialObjective.backward`, for methods that need them; none of these is
                captured.

        Returns:
            Detached device scalars ``loss``, ``task_loss`` and ``divergence``, before ``scale``.
        """
        if self.reason is not None:
            return self._run_eagerly(batch, scale, update, samples)
        if self._learning_rates() != self._rates:
            raise ValueError(
                f"optimizer: its learning rate changed from {self._rates} to {self._learning_rates()}, which a "
                "captured step does not see; pass lr as a tensor on the device, which schedulers change in place"
            )
        if (held := self._held()) != self._last_held:
            self._shapes.clear()
            self._last_held = held
        items = batch.get("num_items_in_batch")
        if isinstance(items, int):  # which would be a shape of its own
            batch = {**batch, "num_items_in_batch": torch.full((), items, device=self._device)}
        plan = self._objective.begin_step()
        key = (shape_of_batch(batch), _autocast(self._device), plan.weights, plan.check_signal)
        shape = self._shapes.setdefault(key, _Shape())
        seed = self._objective.draw_seed() if plan.weights.perturbs else None
        if shape.replay is None and (shape.steps < WARM_STEPS or self._full()):
            figures = self._warm(shape, batch, plan, seed, scale)
            self._last_held = self._held()  # the first steps make the optimizer's state
            return figures
        if shape.replay is None:
            self._capture(shape, batch, plan, seed)
        return self._replay(shape, batch, seed, scale)

    def _full(self) -> bool:
        """Whether there are as many graphs as there may be; says so the first time."""
        full = sum(shape.replay is not None for shape in self._shapes.values()) >= MOST_GRAPHS
        if full and not self._said_full:
            self._said_full = True
            warnings.warn(
                f"{MOST_GRAPHS} shapes of batches are captured, others run as they are; pad batches to fewer lengths",
                stacklevel=3,
            )
        return full

    def _held(self) -> tuple[Any, ...]:
        """What a graph has the addresses and values of: trained parameters, the optimizer's state and constants."""
        held: list[Any] = [id(parameter) for parameter in self._parameters]
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                held += [(name, value) for name, value in sorted(group.items()) if isinstance(value, int | float)]
            for state in self._optimizer.state.values():
                held += [value.data_ptr() if isinstance(value, Tensor) else value for value in state.values()]
        return tuple(held)

    @property
    def _device(self) -> torch.device:
        return device_of(unwrap(self._objective.model))

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._objective.model.parameters() if parameter.requires_grad]

    def _run_eagerly(
        self, batch: Mapping[str, Any], scale: float | Tensor, update: Update | None, samples: Samples | None
    ) -> dict[str, Tensor]:
        for parameter in self._parameters:
            parameter.grad = None
        figures = self._objective.backward(batch, scale, update=update, samples=samples)
        if self._optimizer is not None:
            self._optimizer.step()
        return figures

    def _step(
        self,
        batch: Mapping[str, Any],
        plan: Plan,
        seed: Tensor | None,
        scale: float | Tensor,
        random: Callable[[torch.device], RepeatedState],
    ) -> dict[str, Tensor]:
        """All of it, as it is captured."""
        for parameter in self._parameters:
            parameter.grad = None
        options = TaskOptions(backward=lambda loss: (loss * scale).backward())
        output = self._objective.run_step(batch, plan, Draw(seed, 0, None, None), options, random)
        (output.loss * scale).backward()
        if self._optimizer is not None:
            self._optimizer.step()
        return output.figures()

    def _warm(
        self, shape: _Shape, batch: Mapping[str, Any], plan: Plan, seed: Tensor | None, scale: float | Tensor
    ) -> dict[str, Tensor]:
        counted: list[_Counted] = []

        def counting(device: torch.device) -> RepeatedState:
            counted.append(_Counted(RandomState(device)))
            return counted[-1]

        figures: dict[str, Tensor] = {}
        self._graphs.warm(lambda: figures.update(self._step(batch, plan, seed, scale, counting)))
        shape.steps += 1
        shape.restores = sum(state.restores for state in counted)
        return figures

    def _capture(self, shape: _Shape, batch: Mapping[str, Any], plan: Plan, seed: Tensor | None) -> None:
        device, telemetry = self._device, self._objective.telemetry
        shape.batch = copied_batch(batch, device)
        shape.seed = None if seed is None else seed.clone()
        shape.scale = torch.ones((), device=device)
        before = telemetry.counts.copy()
        kept: list[Tensor] = []

        def body(states: RepeatedState) -> None:
            figures = self._step(shape.batch, plan, shape.seed, shape.scale, lambda _: states)
            kept.append(torch.stack([figures[name].to(figures["loss"].dtype) for name in sorted(figures)]))

        enabled, dtype = _autocast(device)
        # weights that were cast before the capture, or in it, belong to no other step
        precision = torch.autocast(device.type, dtype=dtype, cache_enabled=False) if enabled else nullcontext()
        try:
            with precision:
                replay = self._graphs.record(body, shape.restores)
        finally:
            shape.counts = telemetry.counts - before
            telemetry.counts = before
        shape.replay, shape.figures = replay, kept[0]
        shape.gradients = [parameter.grad for parameter in self._parameters]

    def _replay(
        self, shape: _Shape, batch: Mapping[str, Any], seed: Tensor | None, scale: float | Tensor
    ) -> dict[str, Tensor]:
        copy_into_batch(shape.batch, batch)
        if seed is not None:
            shape.seed.copy_(seed)
        if isinstance(scale, Tensor):
            shape.scale.copy_(scale)
        else:
            shape.scale.fill_(scale)
        shape.replay()
        for parameter, gradient in zip(self._parameters, shape.gradients, strict=True):
            parameter.grad = gradient
        self._objective.telemetry.counts.update(shape.counts)
        return dict(zip(("divergence", "loss", "task_loss"), shape.figures.clone(), strict=True))

    def _learning_rates(self) -> list[float]:
        """Those that are numbers, which a capture fixes."""
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        return [group["lr"] for group in groups if not isinstance(group.get("lr"), Tensor | None)]

    def _give_up(self, reason: str | None) -> None:
        self.reason = reason
        if reason is not None:
            warnings.warn(f"steps are not captured: {reason}", stacklevel=4)


class _Counted:
    """A state that counts how often it was restored."""

    def __init__(self, state: RepeatedState) -> None:
        self._state, self.restores = state, 0

    def restore(self) -> None:
        self.restores += 1
        self._state.restore()


def obstacle(objective: Objective, optimizer: torch.optim.Optimizer | None) -> str | None:
    """Why the steps of an objective cannot be captured; None where they can."""
    config = objective.config
    if objective.model is not unwrap(objective.model):
        return "the model is in DistributedDataParallel, which is not captured"
    if objective.process_group is not None or is_fully_sharded(objective.model):
        return "ranks talk to each other in a step, which is not captured"
    if config.backward != "final":
        return f"{config.method} trains on every pass of its ascent"
    if config.climbs_linearity:
        return f"{config.method} differentiates twice"
    if config.proximal > 0:
        return "the teacher of the proximal term follows the optimizer on the host"
    if config.delta_lifetime > 1:
        return "delta_lifetime > 1 keeps perturbations on the host"
    if config.alpha_schedule:
        return "alpha_schedule changes a weight that a capture would fix"
    if config.ascent_depth and config.dropout == "shared":
        return "ascent_depth repeats dropout's masks from the middle of a pass; dropout='independent' or 'off' does not"
    if config.ascent_dtype == "float8":
        return "ascent_dtype 'float8' was never captured"
    if objective.linear_head is not None and config.labelled_capacity is None:
        return "the number of labelled positions is read from the device; set labelled_capacity"
    if recomputes_segments(objective.model):
        return "recomputed segments keep dropout's state on the host"
    if optimizer is None or type(optimizer) is torch.optim.SGD:
        return None
    if not all(group.get("capturable") for group in optimizer.param_groups):
        return f"{type(optimizer).__name__} does not have capturable=True, so it counts its steps on the host"
    return None


def _autocast(device: torch.device) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
