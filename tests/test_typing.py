"""What a type checker tells a user of the package: return types follow from the arguments."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alum_kernels import (
    AdversarialConfig, AdversarialObjective, AdversarialOutput, BackendUnavailableError, js, kl, linear_kl,
    linear_symmetric_kl, noise_init, projected_ascent, squared_error, squared_hellinger, symmetric_kl,
    symmetric_kl_grad,
)
from alum_kernels.evaluation import Quartiles, RobustnessReport, accuracy_under_attack, largest_loss_increase

config: AdversarialConfig = AdversarialConfig.alum_finetuning(normalize="linf", std=1e-2)
smart: AdversarialConfig = AdversarialConfig.smart(norm="l2").replace(alpha=2.0)
again: AdversarialConfig = AdversarialConfig.from_json(smart.to_json())


def train(model: nn.Module, batches: Iterable[Mapping[str, Any]], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    adversarial = AdversarialObjective(model, config, head="classification")
    adversarial.follow(optimizer)
    for step, batch in enumerate(batches):
        adversarial.set_progress(step, 10)
        output: AdversarialOutput = adversarial(**batch)
        output.loss.backward()
        logits: Tensor = output.logits
        proximal: Tensor | None = output.proximal
        figures: dict[str, Tensor] = adversarial.backward(batch, scale=0.5)
    captured = adversarial.capture({"x": torch.ones(1)}, optimizer)
    reason: str | None = captured.reason
    adversarial.load_state_dict(adversarial.state_dict())
    return adversarial.telemetry.read()


def kernels(embeds: Tensor, weight: Tensor) -> Tensor:
    noisy: Tensor = noise_init(embeds, std=1e-3, seed=1)
    both: tuple[Tensor, Tensor] = noise_init(embeds, seed=1, return_delta=True)
    moved: Tensor = projected_ascent(embeds, noisy, seed=1, step_size=1.0, epsilon=1.0)
    more: tuple[Tensor, ...] = projected_ascent(embeds, noisy, both[1], step_size=1.0, epsilon=1.0, return_stats=True)
    loss, grad = symmetric_kl_grad(noisy, embeds)
    rows: list[Tensor] = [op(noisy, moved) for op in (symmetric_kl, kl, js, squared_hellinger, squared_error)]
    rows += [op(noisy[0], embeds[0], weight) for op in (linear_symmetric_kl, linear_kl)]
    try:
        symmetric_kl(noisy, embeds, backend="native")
    except BackendUnavailableError as error:
        print(error)
    return torch.stack([loss, grad.sum(), *more, *rows])


def evaluate(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    report: RobustnessReport = accuracy_under_attack(model, batches, epsilon=1e-3)
    quartiles: Quartiles = largest_loss_increase(model, batches, epsilon=1e-3).quartiles()
    return quartiles.median


wrong: int = noise_init(torch.ones(1, 1, 1), seed=1)
"""


@pytest.mark.slow
def test_a_program_of_a_user_type_checks_but_for_its_planted_error(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(PROGRAM)
    # errors in the bodies of installed packages are not shown to a user
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--check-untyped-defs", "program.py"]
    environment = {"MYPYPATH": str(ROOT), "PATH": "", "MYPY_CACHE_DIR": str(tmp_path / "cache")}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    (error, summary) = ran.stdout.splitlines()
    line = PROGRAM.splitlines().index("wrong: int = noise_init(torch.ones(1, 1, 1), seed=1)") + 1
    assert error.startswith(f"program.py:{line}: error: Incompatible types in assignment")
    assert 'expression has type "Tensor"' in error
    assert summary.startswith("Found 1 error")
