"""Registers, shared memory and spills of every kernel on every architecture, compiled ahead of time.

    python -m benchmarks.resources                      # Triton kernels for sm_80, sm_90, sm_100, and the built module
    python -m benchmarks.resources --cuda-only --module build/symmetric_kl.o
    python -m benchmarks.resources --json resources.json

No GPU is needed: Triton compiles for a named target, and the figures are read from the machine code, its own and that
in the native module. A kernel that spills is an error: the exit status is 1.
"""

import argparse
import importlib.util
import itertools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .machine import facts, write_results
from .table import Table

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


STORED = ("embeds_ptr", "grad_ptr", "perturbed_ptr", "a_ptr", "b_ptr", "grad_a_ptr", "grad_b_ptr", "grad_sum_ptr")
"""Pointers to tensors in a storage dtype."""


def _types(kernel: Any, storage: str, constants: dict[str, Any], stored: tuple[str, ...] = STORED) -> dict[str, str]:
    """Signature of a kernel by the names of its arguments."""
    kinds = {}
    for name in kernel.arg_names:
        if name in constants:
            kinds[name] = "constexpr"
        elif name == "seed_ptr" or name == "mask_ptr":
            kinds[name] = "*i64"
        elif name in stored:
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
    from alum_kernels.backends.triton import linear_symmetric_kl, noise_init, projected_ascent, symmetric_kl

    def variant(name: str, kernel: Any, storage: str, warps: int, **constants: Any) -> Variant:
        return Variant(f"{name} {storage}", kernel, _types(kernel, storage, constants), constants, warps)

    def linear_variants(name: str, storage: str, constants: dict[str, Any]) -> Iterator[Variant]:
        outputs = ("grad_a_ptr", "grad_sum_ptr")
        for columns in (4, 2048):
            shape = {"ROWS": min(linear_symmetric_kl.TILE_COLUMNS // columns, 256), "COLUMNS": columns}
            kernel, chosen = linear_symmetric_kl._tile_linear_rows, constants | shape
            yield Variant(
                f"{name} tile V={columns} {storage}", kernel, _types(kernel, storage, chosen, outputs), chosen, 4
            )
        kernel, chosen = (
            linear_symmetric_kl._stream_linear_rows,
            constants | {"BLOCK": linear_symmetric_kl.STREAM_BLOCK},
        )
        types, warps = _types(kernel, storage, chosen, outputs), linear_symmetric_kl.STREAM_WARPS
        yield Variant(f"{name} stream {storage}", kernel, types, chosen, warps)

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
            for role in ("loss+gradients", "loss+gradient", "loss"):
                common = {
                    "DIVERGENCE": divergence, "CONVENTION": convention, "HAS_WEIGHT": True,
                    "WANTS_STATS": role == "loss", "WANTS_A": role != "loss", "WANTS_B": role == "loss+gradients",
                }  # fmt: skip
                for columns in (4, 64, 2048) if every else (4, 2048):
                    yield variant(
                        f"{role} tile V={columns} {label}", symmetric_kl._tile_rows, storage, 4, **common,
                        ROWS=min(symmetric_kl.TILE_COLUMNS // columns, 256), COLUMNS=columns,
                    )  # fmt: skip
                yield variant(
                    f"{role} stream {label}",
                    symmetric_kl._stream_rows,
                    storage,
                    symmetric_kl.STREAM_WARPS,
                    **common,
                    BLOCK=symmetric_kl.STREAM_BLOCK,
                )
            for columns in (4, symmetric_kl.GRADIENT_BLOCK):
                yield variant(
                    f"gradient V={columns} {label}", symmetric_kl._gradient, storage, 8, DIVERGENCE=divergence,
                    CONVENTION=convention, WANTS_A=True, WANTS_B=True,
                    ROWS=min(symmetric_kl.GRADIENT_BLOCK // columns, 256), COLUMNS=columns,
                )  # fmt: skip
            for differences, wanted in itertools.product((True, False), ("sum", "one", "loss") if every else ("sum",)):
                constants = {
                    "DIVERGENCE": divergence, "CONVENTION": convention, "DIFFERENCES": differences, "HAS_BIAS": True,
                    "HAS_WEIGHT": True, "WANTS_A": wanted != "loss",
                    "WANTS_SUM": wanted == "sum" and convention == "full",
                }  # fmt: skip
                yield from linear_variants(f"linear {wanted} {'d' if differences else 'a'} {label}", storage, constants)


def _tool(name: str) -> str:
    """A CUDA binary utility: the toolkit's, or the one that comes with Triton."""
    found = shutil.which(name)
    if found is None and (triton := importlib.util.find_spec("triton")) is not None and triton.origin is not None:
        found = shutil.which(name, path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    if found is None:
        raise RuntimeError(f"{name}: neither on the PATH nor in the triton package")
    return found


def _read_machine_code(path: Path | str) -> Iterator[Usage]:
    """Usage of every function in a cubin, an object file or a shared object, for every architecture in it.

    Whatever is spilt lies in the stack frame. Shared memory is the kernel's own, from sm_90 on with the 1 KiB that the
    driver takes, without what a launch adds.
    """
    report = subprocess.run(
        [_tool("cuobjdump"), "--dump-resource-usage", path], check=True, capture_output=True, text=True
    ).stdout
    architecture, name = "-", ""  # the report on a cubin names none
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


def cuda_usage(path: Path | None = None) -> list[Usage]:
    """Usage of every CUDA kernel in the native module, or in the module or object file at ``path``.

    Empty if the native module was built without CUDA. A file that was named and holds no machine code raises.
    """
    if path is None:
        from alum_kernels.backends.native import load

        module, reason = load()
        if module is None:
            raise RuntimeError(f"native module: {reason}")
        if not module.build_info()["cuda_architectures"]:
            return []
        path = Path(module.__file__)
    found = set(_read_machine_code(path))
    if not found:
        raise RuntimeError(f"{path}: no CUDA machine code in it")
    names = _demangled(sorted({usage.kernel for usage in found}))
    usages = [replace(usage, kernel=f"cuda {names[usage.kernel]}") for usage in found]
    return sorted(usages, key=lambda usage: (usage.kernel, usage.architecture))


def _demangled(names: list[str]) -> dict[str, str]:
    """Kernel names without namespaces, return type and arguments; as they are where there is no c++filt."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return {name: name for name in names}
    texts = subprocess.run(
        [tool], input="\n".join(names), check=True, capture_output=True, text=True
    ).stdout.splitlines()
    bare = (re.sub(r"\(anonymous namespace\)::|\b(alum|cuda|portable)::|^void ", "", text) for text in texts)
    return {name: re.sub(r"\([A-Z]\w*Arguments\b.*$", "", text) for name, text in zip(names, bare, strict=True)}


def _compile_number(task: tuple[int, int, bool]) -> Usage:
    number, capability, every = task
    return compile_triton(list(triton_variants(every))[number], capability)


def triton_usage(every: bool = False, targets: tuple[int, ...] = TRITON_TARGETS) -> Iterator[Usage]:
    """Compile on all cores (kernels do not travel between processes, their place in the list does)."""
    tasks = [(i, target, every) for i in range(len(list(triton_variants(every)))) for target in targets]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_compile_number, tasks)


def _report(usages: Iterable[Usage]) -> list[Usage]:
    """Print usages as they come."""
    table = Table([("kernel", 66), ("arch", 8), ("regs", 5), ("shared", 7), ("spilt", 6)], text_columns=2)
    shown = []
    for usage in usages:
        table.row(usage.kernel, usage.architecture, str(usage.registers), str(usage.shared), str(usage.spilt))
        shown.append(usage)
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file or folder for the results")
    parser.add_argument("--triton-only", action="store_true", help="leave the native module out")
    parser.add_argument("--cuda-only", action="store_true", help="leave Triton out")
    parser.add_argument("--module", type=Path, help="native module, object file or cubin to inspect (the built module)")
    parser.add_argument("--every", action="store_true", help="every combination of choices, not only every branch")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels do not compile")
    if options.triton_only and (options.cuda_only or options.module):
        parser.error("--triton-only: excludes --cuda-only and --module")
    in_module = [] if options.triton_only else cuda_usage(options.module)
    if not in_module and not options.triton_only:
        print("the native module was built without CUDA: none of its kernels are in the table")
    of_triton = iter(()) if options.cuda_only else triton_usage(options.every)
    usages = _report(itertools.chain(of_triton, in_module))
    if options.json:
        known = facts(torch.device("cpu"))
        write_results(options.json, "resources", known, results=[asdict(usage) for usage in usages])
    spilling = [usage for usage in usages if usage.spilt]
    for usage in spilling:
        print(f"spills: {usage.kernel} on {usage.architecture}, {usage.spilt} bytes a thread")
    print(f"{len(usages)} compiled kernels, {len(spilling)} spill")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
