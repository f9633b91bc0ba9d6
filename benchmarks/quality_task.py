"""One task of the quality benchmark: its data, the calibration of its methods, and trainings that are judged."""

import argparse
import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.corpora import CorpusError
from alum_kernels.evaluation import accuracy_under_attack

from .checkout import imports_from_examples
from .quality_results import Job, equal_time_steps
from .timing import Timing, measure

with imports_from_examples("quality"):
    from examples.encoding import DevSet, dev_set, training_batches
    from examples.fine_tuning import Start, check_methods, evaluate, fine_tune, new_model
    from examples.glue_tasks import REGRESSION, Examples, TaggedSentences, TaskData, read_task
    from examples.methods import method_config
    from examples.training import Batch, Run, adamw, adversarial_objective, placed_on, training_step

NORMS = ("linf", "l2")
WARM_UP = 2


class TaskBench:
    """One task of the benchmark: its data, and the trainings on it."""

    def __init__(self, name: str, chosen: argparse.Namespace, start: Start, tokenizer) -> None:
        self.chosen, self.start, self.tokenizer = chosen, start, tokenizer
        self.data: TaskData = read_task(name, chosen.data).limited(chosen.train_examples, chosen.dev_examples)
        if chosen.batch_size > len(self.data.train):
            raise CorpusError(
                f"--batch-size: expected at most the {len(self.data.train)} training examples of {name}, "
                f"got {chosen.batch_size}"
            )
        self.configs = {method: method_config(method, self.data.task.freelb) for method in chosen.method}
        check_methods(self.data, list(self.configs.values()), start)
        self.dev: DevSet = dev_set(tokenizer, self.data, size=chosen.batch_size, length=chosen.length)
        self.attacked = self._attacked_batches()

    def facts(self) -> dict[str, Any]:
        """What is known before anything is measured, as the result file has it."""
        task, chosen = self.data.task, self.chosen
        steps = chosen.steps
        if chosen.epochs is not None:
            steps = min(steps, max(1, round(chosen.epochs * (len(self.data.train) // chosen.batch_size))))
        return {
            "title": task.title,
            "metrics": list(task.metrics),
            "figures": [*task.metrics, *(f"attacked_{norm}" for norm in self._norms())],
            "train_examples": len(self.data.train),
            "dev_examples": len(self.data.dev),
            "sha256": hashlib.sha256(json.dumps([_plain(self.data.train), _plain(self.data.dev)]).encode()).hexdigest(),
            "steps": steps,
            "configs": {method: config and config.to_dict() for method, config in self.configs.items()},
        }

    def calibrate(self, facts: dict[str, Any]) -> dict[str, Any]:
        """The facts, with timed steps of every method, the steps each gets at equal time, and the time of judging."""
        timings = self._timed_steps()
        seconds = {method: timing.median for method, timing in timings.items()}
        return {
            **facts,
            "calibration": {method: timing.to_dict() for method, timing in timings.items()},
            "equal_time_steps": equal_time_steps(facts["steps"], seconds),
            "judging_s": self._judging_seconds(),
        }

    def run(self, job: Job) -> dict[str, Any]:
        """Train and judge."""
        batches = training_batches(
            self.tokenizer,
            self.data,
            steps=job.steps,
            size=self.chosen.batch_size,
            length=self.chosen.length,
            seed=job.seed,
        )
        run = Run(self.data.task.title, f"{job.method}, seed {job.seed}")
        model = fine_tune(self.data, batches, run, self.configs[job.method], self.start, seed=job.seed, keep_bar=False)
        return {
            **job._asdict(),
            "figures": self.judge(model),
            "ascent_gain": run.mean_telemetry("ascent_gain"),
            "final_loss": sum(run.losses[-10:]) / len(run.losses[-10:]),
            "train_seconds": sum(run.seconds),
        }

    def judge(self, model: nn.Module) -> dict[str, float]:
        """Metrics of the task, and accuracy under the attacks, of a tagging task over words."""
        figures = evaluate(model, self.data, self.dev)
        for norm in self._norms():
            figures[f"attacked_{norm}"] = self._accuracy_under_attack(model, norm, self.attacked)
        return figures

    def _norms(self) -> list[str]:
        attacked = self.attacked and self.data.task.kind != REGRESSION  # where nothing is right or wrong
        return [norm for norm in NORMS if attacked and getattr(self.chosen, f"attack_{norm}") > 0]

    def _accuracy_under_attack(self, model: nn.Module, norm: str, batches: list[Batch]) -> float:
        radius = getattr(self.chosen, f"attack_{norm}")
        return accuracy_under_attack(
            model, batches, epsilon=radius, steps=self.chosen.attack_steps, norm=norm, level="token"
        ).attacked_accuracy

    def _attacked_batches(self) -> list[Batch]:
        """Batches spread evenly over the development examples, which are sorted by length."""
        wanted = -(-self.chosen.attack_examples // self.chosen.batch_size)
        if wanted == 0:
            return []
        stride = max(1, len(self.dev.batches) // wanted)
        return self.dev.batches[stride // 2 :: stride][:wanted]

    def _timed_steps(self) -> dict[str, Timing]:
        """A step of every method on the same batches in turn; all share one model, each has its own optimizer."""
        chosen, device = self.chosen, self.start.device
        model = new_model(self.data, self.start, seed=0).train()
        batches = training_batches(
            self.tokenizer, self.data, steps=chosen.rounds, size=chosen.batch_size, length=chosen.length, seed=0
        )
        placed = [placed_on(device, batch) for batch in batches]
        objectives = {method: adversarial_objective(model, config) for method, config in self.configs.items()}
        periods = {method: _period(config) for method, config in self.configs.items()}
        calls = {}
        for method, objective in objectives.items():
            optimizer = adamw(model, objective, chosen.learning_rate)
            turn = itertools.cycle(placed)
            calls[method] = partial(_steps, model, objective, optimizer, turn, periods[method])
        try:
            timings = measure(calls, device=device, rounds=chosen.rounds, warmup=WARM_UP, sample_seconds=0.0)
            return {
                method: Timing([sample / periods[method] for sample in timing.samples], timing.repeats)
                for method, timing in timings.items()
            }
        finally:
            for objective in objectives.values():
                if objective is not None:
                    objective.remove_hooks()

    def _judging_seconds(self) -> float:
        """About how long :meth:`judge` takes, from a batch of middling length."""
        model = new_model(self.data, self.start, seed=0).eval()
        batch = self.dev.batches[len(self.dev.batches) // 2]
        inputs = placed_on(self.start.device, batch)
        total = 0.0
        for count in (0, len(self.dev.batches)):  # the first call warms up
            began = time.perf_counter()
            with torch.no_grad():
                model(**inputs).logits.cpu()
            total += count * (time.perf_counter() - began)
        for norm in self._norms():
            began = time.perf_counter()
            self._accuracy_under_attack(model, norm, [batch])
            total += len(self.attacked) * (time.perf_counter() - began)
        return total


def _steps(
    model: nn.Module,
    objective: AdversarialObjective | None,
    optimizer: torch.optim.Optimizer,
    turn: Iterator[Batch],
    period: int,
) -> None:
    """Steps on the next batch, one of each cost."""
    batch = next(turn)
    for step in range(period):
        if objective is not None:
            objective.set_progress(step, period)
        training_step(model, objective, optimizer, batch)


def _period(config: AdversarialConfig | None) -> int:
    """Steps after which the cost of a method's steps repeats."""
    return 1 if config is None else config.adversarial_interval * config.delta_lifetime


def _plain(examples: Examples) -> list:
    if isinstance(examples, TaggedSentences):
        return [examples.words, examples.tags]
    return [examples.texts, examples.labels]
