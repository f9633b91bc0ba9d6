"""How rows of a vocabulary are laid out on a GPU. Needs none."""

import argparse
from dataclasses import dataclass
from typing import Any

from alum_kernels.backends import native
from alum_kernels.commands.errors import CommandError
from alum_kernels.commands.parser import checked
from alum_kernels.training import values

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Architecture:
    """What of a device decides; ``multiprocessors`` are those of a usual card."""

    capability: str
    card: str
    shared_kib: int
    """Shared memory that a block may ask for."""
    multiprocessors: int


ARCHITECTURES = (
    Architecture("8.0", "A100", 163, 108),
    Architecture("8.6", "A10, RTX 30", 99, 84),
    Architecture("8.9", "L40S, RTX 40", 99, 142),
    Architecture("9.0", "H100, H200", 227, 132),
    Architecture("10.0", "B200", 227, 148),
    Architecture("12.0", "RTX 50", 99, 170),
)

COUNT = checked(values.whole(1, (1 << 31) - 1))
"""Type of the options that count."""

PATHS = {
    "tile": "a thread a row, rows staged in tiles",
    "staged": "both rows in shared memory, each logit read once",
    "streamed": "rows do not fit: read again, from L2, in each sweep",
}


def row_plans(vocab: int, dtype: str, rows: int, capability: str | None = None) -> dict[str, list[dict[str, Any]]]:
    """For each op, its layout on every architecture, or on the one of ``capability``.

    Raises:
        RuntimeError: where there is no native module, with the reason.
    """
    module, reason = native.load()
    if module is None:
        raise RuntimeError(f"the launch plan needs the native module: {reason}")
    chosen = [a for a in ARCHITECTURES if capability in (None, a.capability)]

    def plans(element_bytes: int, linear: bool) -> list[dict[str, Any]]:
        return [
            {
                "architecture": a,
                **module.row_plan(
                    vocab,
                    element_bytes,
                    rows,
                    int(a.capability.replace(".", "")),
                    a.shared_kib * 1024,
                    a.multiprocessors,
                    linear,
                ),
            }
            for a in chosen
        ]

    # a linear divergence reads what a product left: fp32 whatever the hidden states are
    return {"symmetric_kl": plans(ELEMENT_BYTES[dtype], False), "linear_symmetric_kl": plans(4, True)}


def lines(vocab: int, dtype: str, rows: int, capability: str | None = None) -> list[str]:
    """The layouts as text."""
    out = []
    found = row_plans(vocab, dtype, rows, capability)
    for op, plans in found.items():
        stored = dtype if op == "symmetric_kl" else "fp32"
        pair = 2 * vocab * ELEMENT_BYTES[stored]
        out += [
            f"{op}: {rows:,} rows of {vocab:,} classes in {stored}, {pair / 1024:,.1f} KiB for both logits of a row",
            f"  {'':19}{'path':10}{'blocks':>7}{'threads':>9}{'rows':>7}{'staged':>11}{'shared':>11}{'resident':>10}",
            f"  {'':19}{'':10}{'a row':>7}{'a block':>9}{'a block':>9}{'a block':>9}{'a block':>11}{'a SM':>10}",
        ]
        for plan in plans:
            architecture = plan["architecture"]
            out.append(
                f"  {architecture.capability:5}{architecture.card:14}{plan['path']:10}{plan['blocks_per_row']:>7}"
                f"{plan['threads']:>9}{plan['rows_per_block']:>7}{2 * plan['side_bytes'] / 1024:>7,.1f} KiB"
                f"{plan['shared_bytes'] / 1024:>7,.1f} KiB{plan['resident']:>10}"
            )
        out.append("")
    used = dict.fromkeys(plan["path"] for plans in found.values() for plan in plans)
    return out + [f"{path:10}{PATHS[path]}" for path in used]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--vocab", type=COUNT, required=True, help="classes of a row")
    parser.add_argument("--dtype", choices=ELEMENT_BYTES, default="bf16", help="of the logits (%(default)s)")
    parser.add_argument("--rows", type=COUNT, default=4096, help="rows of a call (%(default)s)")
    parser.add_argument(
        "--device-capability", choices=[a.capability for a in ARCHITECTURES], help="one architecture (all of them)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the layouts."""
    try:
        text = lines(arguments.vocab, arguments.dtype, arguments.rows, arguments.device_capability)
    except RuntimeError as error:
        raise CommandError(str(error), status=1) from error
    print("\n".join(text))
    return 0
