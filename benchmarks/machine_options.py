"""The options of every program that measures on a machine: its threads, its device, and where the figures go."""

import argparse
from pathlib import Path

import torch


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """``--threads``, ``--device`` and ``--json``, which :func:`benchmarks.machine.machine_of` reads."""
    parser.add_argument("--threads", type=int, help="CPU threads (all that PyTorch takes)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file or folder for the results")
