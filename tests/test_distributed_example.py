"""The example of a loop over processes, started by torchrun."""

import os
import subprocess
import sys

import pytest
from processes import TESTS, free_port

from examples import distributed_loop


def losses_in(text: str) -> list[float]:
    return [float(line.split("loss ")[1]) for line in text.splitlines() if line.startswith("step")]


def losses_of(processes: int) -> list[float]:
    """What the example prints, trained by so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run = subprocess.run(
        [*command, str(TESTS / "processes.py"), distributed_loop.__file__],
        cwd=TESTS.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return losses_in(run.stdout)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_learn_what_one_learns(processes, capsys, monkeypatch):
    """30 samples are no multiple of four, so that shares differ in size."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    distributed_loop.main()
    one = losses_in(capsys.readouterr().out)
    for name in place:
        monkeypatch.delenv(name)
    assert len(one) == 4
    assert one[-1] < 0.5 * one[0]
    assert losses_of(processes) == pytest.approx(one, abs=2e-3)
