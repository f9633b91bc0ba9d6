"""Bias and variance of every cheaper estimator of the adversarial step, against the exact step.

    python -m benchmarks.estimators [--batches 64] [--task classification|masked_lm|both] [--batch 8 --length 32]
                                    [--only NAME ...] [--threads 2] [--device cpu|cuda] [--json PATH]

Of each batch the gradient of the regulariser alone, alpha J, is taken: the step with the task's loss left out. The
exact one is ALUM's at a perturbation that shows (epsilon, sigma and eta 1e-2, l-inf steps); dropout is on, its masks
shared by the passes of a step. ``estimator_statistics`` says what is computed from these gradients, and why the bias of
an unbiased estimator is zero in expectation; the control ``exact`` is another draw of the exact step.

Batches are those of ``benchmarks.shapes``: random words of random lengths. The model stands still while gradients are
taken: at MiniLM's pretrained weights after ``--steps-between`` steps of standard training (AdamW, 2e-5). Perturbations
of ``delta_lifetime`` are climbed at each batch's first visit, which is before these steps, and compared at its second.
``adversarial_interval`` is taken over consecutive steps, a period at a time.

    cost        median time of a whole step (zero_grad, forward, backward, with the task's loss) over the standard
                step's, rounds interleaved; where an estimator has cheaper steps between, the mean over a period
    bound       the same in passes through the layers, backwards to the input alone counting 1 and others 2 forwards;
                embeddings and head are left out
    variance    beyond that of the exact gradient, in mean squares of an exact gradient
    holds 0     whether the 95 % interval of the bias does: of twenty unbiased estimators, one does not

A small interval that leaves zero out is a bias; an interval that holds zero is a bias below its width.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective

from .estimator_statistics import EstimatorStatistics, Exact, FlatGradient, GradientMoments
from .machine import machine_of, write_results
from .machine_options import add_machine_options
from .naive_step import standard_step
from .shapes import MINILM_TASKS, minilm
from .table import Table, ratio
from .timing import Call, measure

Batch = Mapping[str, Tensor]

EXACT = AdversarialConfig.alum_finetuning(normalize="linf", std=1e-2, epsilon=1e-2, step_size=1e-2)
LEARNING_RATE = 2e-5
NEXT_TO_NOTHING = 1e-20
"""Weight of the task's loss where 0 is refused: its gradient is lost in the rounding of the regulariser's."""

DIRECTION, OTHER, SAME, CONTROL, FIRST_VISIT = range(5)
"""Draws of noise and masks; the estimators have ``SAME``."""


@dataclass(frozen=True)
class Estimator:
    """One way to estimate the gradient of the exact step.

    Attributes:
        name: the config's field, or ``exact``, or ``noise_only``.
        setting: its value in words.
        changes: what differs from the exact step, one sentence.
        fields: of the config.
        passes: what a step adds to the standard one, in standard steps, given the number of layers; None: not known.
    """

    name: str
    setting: str
    changes: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    passes: Callable[[int], float] | None = None

    def config(self, **changes: Any) -> AdversarialConfig:
        return EXACT.replace(**{**self.fields, **changes})

    def regulariser(self) -> AdversarialConfig:
        """The step without the task's loss."""
        return self.config(clean_weight=NEXT_TO_NOTHING if self.interval > 1 else 0.0)

    @property
    def interval(self) -> int:
        return self.fields.get("adversarial_interval", 1)

    @property
    def lifetime(self) -> int:
        return self.fields.get("delta_lifetime", 1)

    @property
    def period(self) -> int:
        """Steps after which their cost repeats."""
        return self.interval * self.lifetime

    def bound(self, layers: int) -> float | None:
        """Cost in standard steps by counted passes."""
        return None if self.passes is None else 1 + self.passes(layers)


def _fraction(share: float) -> Estimator:
    return Estimator(
        "adversarial_fraction",
        f"{share:g}",
        "The regulariser is that of so many samples, chosen at random, over their share of all compared rows.",
        {"adversarial_fraction": share},
        lambda layers: 5 * share / 3,
    )


def _interval(steps: int) -> Estimator:
    return Estimator(
        "adversarial_interval",
        f"{steps}",
        "The regulariser is there in one of so many steps, with so many times its weight.",
        {"adversarial_interval": steps},
        lambda layers: 5 / (3 * steps),
    )


def _depth(depth: int) -> Estimator:
    return Estimator(
        "ascent_depth",
        f"{depth}",
        "The perturbation is added after so many layers, not to the embeddings: another regulariser.",
        {"ascent_depth": depth},
        lambda layers: 5 * (1 - depth / layers) / 3,
    )


ESTIMATORS = (
    Estimator(
        "exact", "another draw", "Nothing but the draw of noise and masks: the control.", {}, lambda layers: 5 / 3
    ),
    _fraction(0.5),
    _fraction(0.25),
    _interval(2),
    _interval(4),
    _depth(1),
    _depth(2),
    _depth(3),
    Estimator(
        "ascent_dtype",
        "bfloat16",
        "The direction of the ascent is computed in bfloat16; the pass that trains is not.",
        {"ascent_dtype": "bfloat16"},
    ),
    Estimator(
        "delta_lifetime",
        "2",
        "The perturbation was climbed at the visit before, for older weights and under other masks.",
        {"delta_lifetime": 2},
        lambda layers: 1 + 2 / (3 * 2),
    ),
    Estimator(
        "noise_only", "steps 0", "The perturbation is the noise, nothing is climbed.", {"steps": 0}, lambda _: 1.0
    ),
)
LEAST_BATCHES = 2 * max(estimator.interval for estimator in ESTIMATORS)


def standard_training(model: nn.Module, batches: Sequence[Batch]) -> None:
    """A step of AdamW on each batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for batch in batches:
        standard_step(model, batch)
        optimizer.step()
        optimizer.zero_grad()


class Regulariser:
    """The gradient of one estimator's regulariser on batch after batch.

    Args:
        model: the model.
        estimator: how it is computed.
    """

    def __init__(self, model: nn.Module, estimator: Estimator) -> None:
        self.estimator = estimator
        self._objective = AdversarialObjective(model, estimator.regulariser())

    def add_gradient(self, batch: Batch, index: int, draw: int) -> None:
        """Add it to ``.grad``; a function of the batch's place and of the draw."""
        seed = index * (FIRST_VISIT + 1) + draw
        torch.manual_seed(seed)
        samples = None
        if self.estimator.lifetime > 1:
            count = len(batch["labels"])
            samples = range(index * count, (index + 1) * count)
        self._objective.set_progress(index)
        noise = torch.tensor([seed], device=batch["labels"].device)
        self._objective.forward(batch, seed=noise, samples=samples).loss.backward()

    def remove(self) -> None:
        self._objective.remove_hooks()


def compare(
    model: nn.Module, estimators: Sequence[Estimator], batches: Sequence[Batch], between: Sequence[Batch]
) -> tuple[list[EstimatorStatistics], float]:
    """The statistics of each estimator, and the variance of an exact gradient over its mean square.

    Args:
        model: in training mode; it is trained on ``between``.
        estimators: compared with the exact step.
        batches: what gradients are taken on.
        between: standard training after the first visit of all batches.
    """
    ways = [Regulariser(model, estimator) for estimator in estimators]
    exact = Regulariser(model, ESTIMATORS[0])
    for way in (way for way in ways if way.estimator.lifetime > 1):
        for index, batch in enumerate(batches):
            way.add_gradient(batch, index, FIRST_VISIT)
    model.zero_grad()
    standard_training(model, between)
    gradient = FlatGradient(model)

    def of(way: Regulariser, index: int, draw: int) -> Tensor:
        gradient.values.zero_()
        way.add_gradient(batches[index], index, draw)
        return gradient.values

    direction = torch.zeros_like(gradient.values)
    for index in range(len(batches)):
        direction.add_(of(exact, index, DIRECTION), alpha=1 / len(batches))
    moments = [GradientMoments(way.estimator.interval) for way in ways]
    noise = squares = 0.0
    for index in range(len(batches)):
        known = Exact(of(exact, index, SAME).clone(), of(exact, index, OTHER).clone(), direction)
        noise += float((known.same_draw - known.other_draw).square().sum()) / 2
        squares += float(known.same_draw.square().sum())
        for way, own in zip(ways, moments, strict=True):
            own.add(of(way, index, CONTROL if way.estimator.name == "exact" else SAME), known)
    for way in (*ways, exact):
        way.remove()
    return [own.result() for own in moments], noise / squares


def costs(
    model: nn.Module, estimators: Sequence[Estimator], batch: Batch, device: torch.device, rounds: int
) -> list[float]:
    """Time of a step of each, in standard steps."""
    objectives = [AdversarialObjective(model, estimator.config()) for estimator in estimators]
    samples = range(len(batch["labels"]))

    def standard() -> None:
        model.zero_grad(set_to_none=True)
        standard_step(model, batch)

    def steps(estimator: Estimator, objective: AdversarialObjective) -> Call:
        def call() -> None:
            for _ in range(estimator.period):
                model.zero_grad(set_to_none=True)
                objective.backward(batch, samples=samples if estimator.lifetime > 1 else None)

        return call

    calls = {"standard": standard}
    for place, (estimator, objective) in enumerate(zip(estimators, objectives, strict=True)):
        calls[str(place)] = steps(estimator, objective)
    timings = measure(calls, device=device, rounds=rounds)
    for objective in objectives:
        objective.remove_hooks()
    base = timings["standard"].median
    periods = [estimator.period for estimator in estimators]
    return [timings[str(place)].median / period / base for place, period in enumerate(periods)]


def run_task(task: str, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure and print one task."""
    shape = minilm(task, options.batch, options.length)
    model = shape.make_model(device)
    chosen = [one for one in ESTIMATORS if one.name == "exact" or not options.only or one.name in options.only]
    every = [shape.make_batch(device, seed=1 + index) for index in range(options.batches + options.steps_between)]
    relative = costs(model, chosen, every[0], device, options.rounds)
    biases, noise = compare(model, chosen, every[: options.batches], every[options.batches :])
    print(f"\n{task}: {options.batches} batches of {options.batch} x {options.length}")
    print(f"of an exact gradient's mean square, {noise:.1%} are the noise of its draw")
    table = Table(
        [
            *(("estimator", 21), ("setting", 12), ("cost", 6), ("bound", 6), ("bias", 8), ("95 % interval", 18)),
            *(("bias^2", 8), ("variance", 8), ("cosine", 7), ("holds 0", 7)),
        ],
        text_columns=2,
    )
    results = []
    for estimator, cost, found in zip(chosen, relative, biases, strict=True):
        bound = estimator.bound(model.config.num_hidden_layers)
        table.row(
            estimator.name,
            estimator.setting,
            ratio(cost),
            ratio(bound),
            f"{found.bias:+.4f}",
            f"{found.low:+.4f} {found.high:+.4f}",
            f"{found.squared:.4f}",
            f"{found.variance:.3f}",
            f"{found.cosine:.4f}",
            "yes" if found.unbiased else "no",
        )
        results.append(
            {
                "estimator": estimator.name,
                "setting": estimator.setting,
                "task": task,
                "cost": cost,
                "cost_bound": bound,
                "bias": found.bias,
                "bias_low": found.low,
                "bias_high": found.high,
                "bias_squared": found.squared,
                "variance": found.variance,
                "exact_variance": noise,
                "cosine": found.cosine,
                "batches": options.batches,
                "units": found.units,
                "unbiased": found.unbiased,
                "changes": estimator.changes,
            }
        )
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(estimator.name for estimator in ESTIMATORS))
    parser.add_argument("--batches", type=int, default=64, help="of which gradients are taken")
    parser.add_argument("--task", choices=(*MINILM_TASKS, "both"), default="both")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--steps-between", type=int, default=16, help="standard steps between two visits of a batch")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each step's time")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    add_machine_options(parser)
    options = parser.parse_args(arguments)
    if options.batches < LEAST_BATCHES:
        parser.error(f"argument --batches: expected {LEAST_BATCHES} at the least, two of each period")
    device, known = machine_of(options)
    weights = minilm("classification").weights()
    print(f"MiniLM, six layers, {weights}")
    results = []
    for task in MINILM_TASKS if options.task == "both" else (options.task,):
        results += run_task(task, options, device)
    if options.json:
        write_results(
            options.json,
            "estimators",
            known,
            weights=weights,
            batches=options.batches,
            shape=[options.batch, options.length],
            steps_between=options.steps_between,
            rounds=options.rounds,
            config=EXACT.to_dict(),
            results=results,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
