"""Make a page with plots of the results that benchmarks wrote."""

import argparse
from pathlib import Path

from alum_kernels.commands.benchmark_programs import run_program
from alum_kernels.commands.errors import CommandError
from alum_kernels.commands.invocation import program


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="results of benchmarks, JSON")
    parser.add_argument("--output", type=Path, required=True, metavar="PAGE", help="the page, HTML")


def run(arguments: argparse.Namespace) -> int:
    """Write the page."""
    for file in arguments.files:
        if not file.is_file():
            raise CommandError(f"expected files with results, got {file}, which is none")
    words = [*map(str, arguments.files), "--output", str(arguments.output)]
    return run_program("report.__main__", words, f"{program()} report")
