"""Who takes the whole step: the calls that ``benchmarks/step.py`` times.

    standard          forward and backward of the task
    naive             benchmarks/naive_step.py; a language model's predictions are compared at all positions
    naive, labelled   the same, compared at labelled positions only
    smart-pytorch     the package's loss around the same passes
    ours              AdversarialObjective(model, AdversarialConfig.alum_finetuning()).backward(batch); a language model
                      is compared at labelled positions, without logits
    ours, captured    the same step replayed as one CUDA graph; a masked LM with room for 20 % of the positions
    ours, rho 0.25    the regulariser on a quarter of the batch
    ours, all         positions="all": compared at every position that is not padding
    ours, logits      fused_head=False: at labelled positions, through the model's logits

Each of the library's providers has its hooks on a module of its own over the same parameters, as a training has one:
nobody runs through another's hooks. A step is zero_grad, forward passes and backward.
"""

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.adversarial.captured import WARM_STEPS

from .flops import FRACTION
from .naive_step import (
    Rows,
    all_positions,
    class_rows,
    labelled_positions,
    labelled_successors,
    naive_adversarial_step,
    smart_pytorch_step,
    standard_step,
)
from .shapes import Shape
from .timing import Call


class NotRunError(Exception):
    """A provider cannot take a shape's step here; the message says why."""


@dataclass(frozen=True)
class Bench:
    """A shape with its model and batch; ``model`` has no hooks."""

    shape: Shape
    model: nn.Module
    batch: Mapping[str, Tensor]

    @property
    def device(self) -> torch.device:
        return self.batch["input_ids"].device

    def language_model_only(self) -> None:
        """Raises NotRunError for a classifier."""
        if self.shape.task == "classification":
            raise NotRunError("a classifier has one prediction a sequence: nothing to choose among")


@dataclass(frozen=True)
class Step:
    """A provider's step.

    Attributes:
        model: what it calls.
        start: gives the call; called once the model is compiled, if it is, since a graph captures the compiled model.
    """

    model: nn.Module
    start: Callable[[], Call]


def _config() -> AdversarialConfig:
    return AdversarialConfig.alum_finetuning()


def _whole(model: nn.Module, step: Call) -> Step:
    def call() -> object:
        model.zero_grad(set_to_none=True)
        return step()

    return Step(model, lambda: call)


def _standard(bench: Bench) -> Step:
    return _whole(bench.model, lambda: standard_step(bench.model, bench.batch))


def _naive_at(bench: Bench, rows: Rows) -> Step:
    config = _config()
    constants = {
        "alpha": config.alpha, "std": config.std, "step_size": config.step_size, "epsilon": config.epsilon,
    }  # fmt: skip
    return _whole(bench.model, lambda: naive_adversarial_step(bench.model, bench.batch, rows, **constants))


def _all_rows(bench: Bench) -> Rows:
    return class_rows if bench.shape.task == "classification" else all_positions


def _naive(bench: Bench) -> Step:
    return _naive_at(bench, _all_rows(bench))


def _naive_labelled(bench: Bench) -> Step:
    bench.language_model_only()
    return _naive_at(bench, labelled_positions if bench.shape.task == "masked_lm" else labelled_successors)


def _smart_pytorch(bench: Bench) -> Step:
    if importlib.util.find_spec("smart_pytorch") is None:
        raise NotRunError("smart-pytorch is not installed")
    rows, alpha = _all_rows(bench), _config().alpha
    return _whole(bench.model, lambda: smart_pytorch_step(bench.model, bench.batch, rows, alpha=alpha))


def _objective(bench: Bench, **changes: Any) -> AdversarialObjective:
    return AdversarialObjective(bench.shape.make_twin(bench.model), _config().replace(**changes))


def _ours_with(bench: Bench, **changes: Any) -> Step:
    objective = _objective(bench, **changes)
    return _whole(objective.model, lambda: objective.backward(bench.batch))


def _ours(bench: Bench) -> Step:
    return _ours_with(bench)


def _captured(bench: Bench) -> Step:
    objective = _objective(bench, labelled_capacity=CAPACITIES[bench.shape.task])

    def start() -> Call:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "steps are not captured")  # the reason is raised
            captured = objective.capture(bench.batch)
            if captured.reason is None:
                for _ in range(WARM_STEPS + 1):
                    captured(bench.batch)
        if captured.reason is not None:
            raise NotRunError(captured.reason)
        # no zero_grad: a step's gradients take the place of what was there
        return lambda: captured(bench.batch)

    return Step(objective.model, start)


def _ours_on_a_fraction(bench: Bench) -> Step:
    return _ours_with(bench, adversarial_fraction=FRACTION)


def _ours_at_all_positions(bench: Bench) -> Step:
    bench.language_model_only()
    return _ours_with(bench, positions="all")


def _ours_through_logits(bench: Bench) -> Step:
    bench.language_model_only()
    return _ours_with(bench, fused_head=False)


CAPACITIES = {"classification": None, "masked_lm": 0.2, "causal_lm": 1.0}
"""``labelled_capacity`` by task: a captured step of a language model has room for a fixed number of labels. 15 % of a
masked LM's positions have one, and the room beyond is computed."""

STANDARD = "standard"
CAPTURED = "ours, captured"
ON_A_FRACTION = f"ours, rho {FRACTION}"
AT_ALL_POSITIONS = "ours, all"

PROVIDERS: dict[str, Callable[[Bench], Step]] = {
    STANDARD: _standard,
    "naive": _naive,
    "naive, labelled": _naive_labelled,
    "smart-pytorch": _smart_pytorch,
    "ours": _ours,
    CAPTURED: _captured,
    ON_A_FRACTION: _ours_on_a_fraction,
    AT_ALL_POSITIONS: _ours_at_all_positions,
    "ours, logits": _ours_through_logits,
}
"""By name: makes the step, or raises NotRunError."""
