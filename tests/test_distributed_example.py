"""The example of a loop over processes, as its docstring says to run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def losses(processes: int) -> list[float]:
    """What the example prints, trained by so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run = subprocess.run(
        [*command, "-m", "examples.distributed_loop"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [float(line.split("loss ")[1]) for line in run.stdout.splitlines() if line.startswith("step")]


def test_it_learns_the_same_in_one_process_as_in_two():
    one, two = losses(1), losses(2)
    assert len(one) == len(two) == 4
    assert one[-1] < 0.6 * one[0]
    assert two == pytest.approx(one, abs=2e-3)


@pytest.mark.slow
def test_shares_of_four_processes_differ_in_size():
    """30 samples are no multiple of four."""
    assert losses(4) == pytest.approx(losses(1), abs=2e-3)
