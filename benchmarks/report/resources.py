"""Registers, shared memory and spills of every compiled kernel."""

from .files import ResultFile
from .markup import Finding, Html, joined, table, toned

TITLE = "Resources"
INTRO = "Read from the machine code of every kernel; spilt is bytes a thread in its stack frame, which must be none."


def findings(file: ResultFile) -> list[Finding]:
    spilling = [row for row in file.results if row["spilt"]]
    if not spilling:
        return [Finding(f"{len(file.results)} compiled kernels, none spills", "win")]
    named = "; ".join(f"{row['kernel']} on {row['architecture']}, {row['spilt']} bytes" for row in spilling)
    return [Finding(f"{len(spilling)} of {len(file.results)} compiled kernels spill: {named}", "loss")]


def body(file: ResultFile) -> Html:
    rows = file.results
    summary = [
        (
            name,
            len(own),
            max(r["registers"] for r in own),
            max(r["shared"] for r in own),
            sum(r["spilt"] > 0 for r in own),
        )
        for name in dict.fromkeys(row["architecture"] for row in rows)
        if (own := [row for row in rows if row["architecture"] == name])
    ]
    lines = [
        (row["kernel"], row["architecture"], row["registers"], row["shared"],
         toned(str(row["spilt"]), "loss") if row["spilt"] else row["spilt"])
        for row in rows
    ]  # fmt: skip
    return joined(
        (
            table(("architecture", "kernels", "most registers", "most shared bytes", "spilling"), summary),
            table(("kernel", "architecture", "registers", "shared bytes", "spilt bytes"), lines, text_columns=2),
        )
    )


def compared(file: ResultFile) -> dict[str, str]:
    return {
        f"{row['kernel']} on {row['architecture']}": f"{row['registers']} registers, {row['spilt']} spilt"
        for row in file.results
    }
