"""The example of a loop over processes, started by torchrun."""

import os
import subprocess
import sys
from contextlib import nullcontext

import loop_faults
import pytest
from loop_faults import FAULTS
from processes import TESTS, free_port

from examples import distributed_loop


def losses_in(text: str) -> list[float]:
    return [float(line.split("loss ")[1]) for line in text.splitlines() if line.startswith("step")]


def losses_of(processes: int, *program: str) -> list[float]:
    """What the example prints, trained by so many processes; one that waits for ever, or does not end well, fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run = subprocess.run(
        [*command, *program],
        cwd=TESTS.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return losses_in(run.stdout)


@pytest.fixture
def alone(monkeypatch):
    """The variables of a process that is all there is, until they are taken back."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with monkeypatch.context() as patch:
        for name, value in place.items():
            patch.setenv(name, value)
        yield patch


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_learn_what_one_learns(processes, capsys, alone):
    """30 samples are no multiple of four, so that shares differ in size."""
    distributed_loop.main()
    one = losses_in(capsys.readouterr().out)
    alone.undo()
    assert len(one) == 4
    assert one[-1] < 0.5 * one[0]
    assert losses_of(processes, "-m", "examples.distributed_loop") == pytest.approx(one, abs=2e-3)


@pytest.mark.parametrize(
    ("fault", "processes"),
    [
        ("a row of NaN", 2),
        pytest.param("a row of NaN", 4, marks=pytest.mark.slow),
        pytest.param("no samples", 2, marks=pytest.mark.slow),
        pytest.param("no samples", 4, marks=pytest.mark.slow),
    ],
)
def test_no_process_waits_for_one_with_a_fault(fault, processes, capsys, alone):
    """They train on, as one process does: a rank without samples counts for nothing, a spoilt step is left out."""
    FAULTS[fault](alone.setattr)
    spoilt = pytest.warns(UserWarning, match="step is left out") if fault == "a row of NaN" else nullcontext()
    with spoilt:
        distributed_loop.main()
    one = losses_in(capsys.readouterr().out)
    alone.undo()
    assert len(one) == 4
    assert losses_of(processes, loop_faults.__file__, fault) == pytest.approx(one, abs=2e-3)
