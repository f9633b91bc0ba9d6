"""Run a benchmark; what follows its name is passed on to it, --help as well."""

import argparse

from alum_kernels.commands.benchmark_programs import run_program
from alum_kernels.commands.invocation import program

BENCHMARKS = {
    "ops": "ops",
    "step": "step",
    "accuracy": "accuracy",
    "memory": "memory",
    "growth": "growth",
    "linear-head": "linear_head",
    "flops": "flops",
}
"""Name -> module."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("benchmark", choices=BENCHMARKS, help="what is measured")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the benchmark")


def run(arguments: argparse.Namespace) -> int:
    """Run it; the exit code is its own."""
    name = arguments.benchmark
    return run_program(BENCHMARKS[name], arguments.arguments, f"{program()} bench {name}")
