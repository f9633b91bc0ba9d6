"""The options that the drop-in examples have in common: their loops differ, what they are asked for does not."""

import argparse


def drop_in_options(program: str, description: str) -> argparse.Namespace:
    """``model`` (None: the bundled MiniLM), ``steps`` and ``batch_size`` from the command line of a program."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    parser.add_argument("--model", help="name or path (default: the bundled MiniLM)")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of a step (default: %(default)s)")
    return parser.parse_args()
