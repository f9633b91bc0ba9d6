"""Process groups of tests: programs that run as several ranks, and a group of this process alone."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import distributed

TESTS = Path(__file__).parent


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(ranks: int, *arguments: str, seconds: float = 300, **environment: str) -> None:
    """Run Python with these arguments as so many ranks, to the end of all or to the first failure, which is raised.

    A rank has torchrun's variables, those of ``environment``, one thread, and can import what tests can.
    """
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    shared = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "WORLD_SIZE": str(ranks)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{rank}.log") for rank in range(ranks)]
        processes = [
            _started(arguments, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, log)
            for rank, log in enumerate(logs)
        ]
        end = time.monotonic() + seconds
        try:
            # of ranks that wait for one that failed, nothing is to be learnt
            while None in (codes := [process.poll() for process in processes]) and not any(codes):
                assert time.monotonic() < end, f"not done in {seconds} s"
                time.sleep(0.02)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        said = [f"rank {rank}:\n{logs[rank].read_text()[-3000:]}" for rank, code in enumerate(codes) if code]
        assert not said, "\n".join(said)


def _started(arguments: tuple[str, ...], variables: dict[str, str], log: Path) -> subprocess.Popen:
    with log.open("w") as stream:
        return subprocess.Popen([sys.executable, *arguments], env=os.environ | variables, stderr=stream)


def join_group(folder: Path | str) -> tuple[int, int]:
    """Join the group of the processes that :func:`run_ranks` started, over a file in a folder; rank and ranks."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    return rank, ranks


@contextmanager
def group_of_one(folder: Path) -> Iterator[distributed.ProcessGroup]:
    """Within the context this process is a group."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield distributed.group.WORLD
    finally:
        distributed.destroy_process_group()
