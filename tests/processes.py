"""Process groups of tests: programs that run as several ranks, and a group of this process alone.

Run as a program, ``python tests/processes.py PROGRAM [ARGUMENT ...]``, it is one rank of :func:`run_ranks`.
"""

import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from torch import distributed

TESTS = Path(__file__).parent


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(ranks: int, *arguments: str, seconds: float = 300, **environment: str) -> None:
    """Run a program as so many ranks, to the end of all or to the first failure, which is raised.

    Arguments are those of Python: a file and its arguments, or ``"-c"`` and a text. A rank has torchrun's variables,
    those of ``environment``, one thread, and can import what tests can.
    """
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    shared = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "WORLD_SIZE": str(ranks)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment}
    with tempfile.TemporaryDirectory() as folder:
        if arguments[0] == "-c":
            program = Path(folder, "program.py")
            program.write_text(arguments[1])
            arguments = (str(program), *arguments[2:])
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
        return subprocess.Popen([sys.executable, __file__, *arguments], env=os.environ | variables, stderr=stream)


def _run_as_rank(arguments: list[str]) -> NoReturn:
    """Run a program, and leave without the end of the interpreter.

    A thread of gloo drops the tensors of its last collective some time after who waited for it went on. Where Python
    owns one and the interpreter has begun to end, the thread is made to exit within a destructor, which aborts the
    process (pytorch/pytorch#179291). ``destroy_process_group`` joins the thread only where nothing else, such as a
    mesh or a module of FSDP2, still holds the group.
    """
    sys.argv = arguments
    code = 1
    try:
        runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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


if __name__ == "__main__":
    _run_as_rank(sys.argv[1:])
