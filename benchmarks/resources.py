"""Registers, shared memory and spills of every kernel on every architecture, compiled ahead of time.

    python -m benchmarks.resources                      # Triton kernels for sm_80, sm_90, sm_100, and the built module
    python -m benchmarks.resources --json resources.json

No GPU is needed: Triton compiles for a named target, and the figures are read from the machine code, its own and that
in the native module. A kernel that spills is an error: the exit status is 1.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

TRITON_TARGETS = (80, 90, 100)
POINTERS = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}


@dataclass(frozen=True)
class Usage:
    """Resources of one compiled kernel: bytes a block of ``shared``, bytes a thread ``spilt`` to its stack frame."""

    kernel: str
    architecture: str
    registers: int
    shared: int
    spilt: int


@dataclass(frozen=True)
class Variant:
    """One way a Triton kernel is compiled: everything optional is present, so that the largest form is measured."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int


def _types(kernel: Any, storage: str, constants: dict[str, Any]) -> dict[str, str]:
    """Signature of a kernel by the names of its arguments."""
    kinds = {}
    for name in kernel.arg_names:
        if name in constants:
            kinds[name] = "constexpr"
        elif name == "seed_ptr":
            kinds[name] = "*i64"
        elif name == "mask_ptr":
            kinds[name] = "*i64"
        elif name in ("embeds_ptr", "grad_ptr", "perturbed_ptr", "a_ptr", "b_ptr", "grad_a_ptr", "grad_b_ptr"):
            kinds[name] = POINTERS[storage]
        elif name.endswith("_ptr"):
            kinds[name] = "*fp32"
        elif name in ("std", "step_size", "epsilon", "inv_temperature", "grad_scale"):
            kinds[name] = "fp32"
        elif "stride" in name:
            kinds[name] = "i64"
        else:
            kinds[name] = "i32"
    return kinds


def triton_variants(every: bool = False) -> Iterator[Variant]:
    """Every Triton kernel, with each branch compiled at least once; ``every`` combination of choices if asked for."""
    from alum_kernels.backends.triton import noise_init, projected_ascent, symmetric_kl

    def variant(name: str, kernel: Any, storage: str, warps: int, **constants: Any) -> Variant:
        return Variant(f"{name} {storage}", kernel, _types(kernel, storage, constants), constants, warps)

    norms, normalizations = ("linf", "l2", "linf_rescale", "none"), ("none", "l2", "linf", "sign")
    climbs = list(itertools.product(norms, normalizations) if every else zip(norms, normalizations, strict=True))
    divergences = [("symmetric_kl", "full"), ("kl", "full")]
    if every:
        divergences += [("symmetric_kl", "detach_targets"), ("kl", "detach_targets")]

    for storage in POINTERS if every else ("fp32", "bf16"):
        for normal in (True, False):
            yield variant(
                f"noise_init {'normal' if normal else 'uniform'}", noise_init._noise_init, storage, 4, NORMAL=normal,
                HAS_STD=True, HAS_MASK=True, HAS_DELTA=True, BLOCK=noise_init.BLOCK,
            )  # fmt: skip
        for (norm, normalize), by_token in itertools.product(climbs, (True, False)):
            for has_delta in (True, False) if every else (False,):
                yield variant(
                    f"projected_ascent {norm} {normalize} {'token' if by_token else 'group'} "
                    f"{'delta' if has_delta else 'seed'}",
                    projected_ascent._ascend, storage, 4, NORM=norm, NORMALIZE=normalize, BY_TOKEN=by_token,
                    NORMAL=True, HAS_DELTA=has_delta, HAS_STD=True, HAS_STEP=True, HAS_EPSILON=True, HAS_MASK=True,
                    WANTS_DELTA=True, WANTS_STATS=True, ROWS=2, COLUMNS=1024,
                )  # fmt: skip
        for divergence, convention in divergences:
            label = f"{divergence} {convention}"
            for wants_gradient in (True, False):
                common = {
                    "DIVERGENCE": divergence, "CONVENTION": convention, "HAS_WEIGHT": True,
                    "WANTS_STATS": not wants_gradient, "WANTS_GRADIENT": wants_gradient,
                }  # fmt: skip
                role = "loss+gradient" if wants_gradient else "loss"
                for columns in (4, 64, 2048) if every else (4, 2048):
                    yield variant(
                        f"{role} tile V={columns} {label}", symmetric_kl._tile_rows, storage, 4, **common,
                        ROWS=min(symmetric_kl.TILE_COLUMNS // columns, 256), COLUMNS=columns,
                    )  # fmt: skip
                yield variant(
                    f"{role} stream {label}", symmetric_kl._stream_rows, storage, symmetric_kl.STREAM_WARPS, **common,
                    BLOCK=symmetric_kl.STREAM_BLOCK,
                )
            for columns in (4, symmetric_kl.GRADIENT_BLOCK):
                yield variant(
                    f"gradient V={columns} {label}", symmetric_kl._gradient, storage, 8, DIVERGENCE=divergence,
                    CONVENTION=convention, WANTS_A=True, WANTS_B=True,
                    ROWS=min(symmetric_kl.GRADIENT_BLOCK // columns, 256), COLUMNS=columns,
                )  # fmt: skip


def _cuobjdump() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _read_machine_code(path: Path | str) -> Iterator[Usage]:
    """Usage of every function in a cubin or a shared object. Whatever is spilt lies in the stack frame."""
    report = subprocess.run(
        [_cuobjdump(), "--dump-resource-usage", path], check=True, capture_output=True, text=True
    ).stdout
    architecture, name = "", ""
    for line in report.splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            architecture = found.group(1)
        elif found := re.search(r"Function (\S+):", line):
            name = found.group(1)
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            yield Usage(name, architecture, registers, shared, stack + local)


def compile_triton(variant: Variant, capability: int) -> Usage:
    """Compile one variant for sm_<capability> and read the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from alum_kernels.backends.triton.launch import OPTIONS

    source = ASTSource(fn=variant.kernel, signature=variant.types, constexprs=variant.constants)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": variant.warps, **OPTIONS}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (usage,) = _read_machine_code(file.name)
    return replace(
        usage, kernel=f"triton {variant.name}", architecture=f"sm_{capability}", shared=compiled.metadata.shared
    )


def cuda_usage() -> list[Usage]:
    """Usage of every CUDA kernel in the native module; empty if it was built without."""
    from alum_kernels.backends.native import load

    module, reason = load()
    if module is None:
        raise RuntimeError(f"native module: {reason}")
    if not module.build_info()["cuda_architectures"]:
        return []
    usages = {replace(usage, kernel=f"cuda {_demangle(usage.kernel)}") for usage in _read_machine_code(module.__file__)}
    return sorted(usages, key=lambda usage: (usage.kernel, usage.architecture))


def _demangle(name: str) -> str:
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=False).stdout.strip() or name
    return re.sub(r"\(anonymous namespace\)::|alum::|cuda::|portable::|\(alum.*\)$|\(.*Arguments.*\)$|^void ", "", text)


def _compile_number(task: tuple[int, int, bool]) -> Usage:
    number, capability, every = task
    return compile_triton(list(triton_variants(every))[number], capability)


def triton_usage(every: bool = False, targets: tuple[int, ...] = TRITON_TARGETS) -> Iterator[Usage]:
    """Compile on all cores (kernels do not travel between processes, their place in the list does)."""
    tasks = [(i, target, every) for i in range(len(list(triton_variants(every)))) for target in targets]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_compile_number, tasks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    parser.add_argument("--triton-only", action="store_true", help="leave the native module out")
    parser.add_argument("--every", action="store_true", help="every combination of choices, not only every branch")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels do not compile")
    usages: list[Usage] = []
    print(f"{'kernel':<66} {'arch':<8} {'regs':>5} {'shared':>7} {'spilt':>6}")

    def show(usage: Usage) -> None:
        usages.append(usage)
        print(
            f"{usage.kernel:<66} {usage.architecture:<8} {usage.registers:>5} {usage.shared:>7} {usage.spilt:>6}",
            flush=True,
        )

    for usage in triton_usage(options.every):
        show(usage)
    if not options.triton_only:
        for usage in cuda_usage():
            show(usage)
    if options.json:
        options.json.write_text(json.dumps([asdict(usage) for usage in usages], indent=1) + "\n")
    spilling = [usage for usage in usages if usage.spilt]
    print(f"{len(usages)} compiled kernels, {len(spilling)} spill")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
