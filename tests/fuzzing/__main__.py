"""Run a campaign of random calls.

    python -m tests.fuzzing [--cases N] [--seed S] [--first N] [--ops ...] [--backends ...] [--minutes M] [--case S:N]

Every call is judged against its definition in float64, run twice, and may change none of its inputs by a bit; fresh
memory is poisoned. ``native`` and ``reference`` run every case that they can serve, ``triton`` (in the interpreter) and
``cuda`` (the CUDA kernels, emulated on the host) small ones. The table has the number of cases, the failures, and the
largest share of its tolerance that an error took. The first failures are printed with the ``--case`` that repeats each
alone; the exit status is 1 if there are any. ``ALUM_CPU_CAPABILITY`` chooses the instruction set of ``native``.
"""

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # as pytest has it
os.environ.setdefault("TRITON_INTERPRET", "1")  # decided when a kernel is defined

import torch  # noqa: E402 - after the environment

from fuzzing.campaign import OPS, Report, campaign, draw_case  # noqa: E402 - after the path

BACKENDS = ("reference", "native", "triton", "cuda")
SHOWN = 10


def progress(report: Report) -> None:
    live = sys.stdout.isatty()
    if report.cases % (50 if live else 1000) == 0:
        end = "\r" if live else "\n"
        print(f"{report.cases} cases, {len(report.failures)} failures", end=end, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000, help="how many numbers to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS[:3])
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--case", metavar="SEED:NUMBER", help="this one alone")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.use_deterministic_algorithms(True, warn_only=True)  # poisons fresh memory
    emulation = None
    if "cuda" in arguments.backends:
        from fuzzing.emulated_backend import emulation_in

        emulation = emulation_in(ROOT / "build" / "cuda_emulation")
    seed, numbers = arguments.seed, range(arguments.first, arguments.first + arguments.cases)
    if arguments.case:
        seed, number = (int(part) for part in arguments.case.split(":"))
        numbers = (number,)
        print(draw_case(seed, number))
    started = time.monotonic()
    report = campaign(
        seed,
        numbers,
        ops=arguments.ops,
        backends=arguments.backends,
        emulation=emulation,
        seconds=60 * arguments.minutes,
        progress=None if arguments.case else progress,
    )
    print(f"\n{report.cases} cases of seed {seed} in {time.monotonic() - started:.0f} s\n{report.table()}")
    for failure in report.failures[:SHOWN]:
        print(f"\n{failure}")
    if len(report.failures) > SHOWN:
        print(f"\n... and {len(report.failures) - SHOWN} more")
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
