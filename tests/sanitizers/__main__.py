"""The native CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tests.sanitizers [--cases N] [--seed S] [--capabilities baseline avx2 avx512] [--build FOLDER]

Builds a module of its own (about four minutes on a core), sees that it finds faults planted on purpose, and runs over
it, for each instruction set that this processor has, the tests of the native kernels and a campaign of random calls.
The first error ends its process with the sanitizer's report; the exit status is 1 if there was any. Needs GCC's libasan
and libubsan, cmake, ninja and pybind11.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # as pytest has it

from sanitizers.build import compile_module, link_tree, watched_environment  # noqa: E402 - after the path
from sanitizers.faults import REPORTS  # noqa: E402 - after the path

CAPABILITIES = ("baseline", "avx2", "avx512")
TESTS = {
    "native and not 30522": ["tests/test_symmetric_kl.py", "tests/test_symmetric_kl_edges.py", "tests/test_threads.py"],
    "native and not 9000": ["tests/test_noise_init.py", "tests/test_projected_ascent.py", "tests/test_linear_rows.py"],
    "native and (64 or 65 or 17)": ["tests/test_symmetric_kl_accuracy.py"],
}
"""Expressions that select tests, and the files to select from. (At 9000 classes the accuracy of the usual build is
close to its bound; without optimisation other products are fused with sums.)"""
SHOWN = 60
LIMIT = 1800


def run(name: str, command: list[str], tree: Path, capability: str) -> tuple[int, str]:
    """Run one command in the tree and show a line about it; its status and output."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env=watched_environment(capability),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        timeout=LIMIT,
    )
    lines = done.stdout.strip().splitlines()
    last = lines[-1] if lines else ""
    print(f"{capability}: {name}: status {done.returncode}, {time.monotonic() - started:.0f} s: {last}", flush=True)
    return done.returncode, done.stdout


def faults_are_found(tree: Path) -> bool:
    """Whether each planted fault ends its process with the report that it must give."""
    found = True
    for kind, report in REPORTS.items():
        status, output = run(f"planted fault, {kind}", ["-m", "tests.sanitizers.faults", kind], tree, "baseline")
        if status == 0 or report not in output:
            print(f"expected {report!r}, got:\n{output[-2000:]}")
            found = False
    return found


def capability_exists(tree: Path, capability: str) -> bool:
    code = "import torch, alum_kernels._C as module; print(module.build_info()['cpu_capability'])"
    status, output = run("module", ["-c", code], tree, capability)
    if "this processor has no" in output:
        return False
    if status != 0 or output.split()[-1:] != [capability]:
        raise RuntimeError(f"{capability}: the module does not load:\n{output}")
    return True


def watched_runs(tree: Path, capability: str, cases: int, seed: int) -> bool:
    """Tests and a campaign on one instruction set; whether all of them passed."""
    commands = {
        f"tests, {expression}": ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", expression, *files]
        for expression, files in TESTS.items()
    }
    commands["campaign"] = ["-W", "ignore", "-m", "tests.fuzzing", "--cases", str(cases), "--seed", str(seed)]
    commands["campaign"] += ["--backends", "native"]
    passed = True
    for name, command in commands.items():
        status, output = run(name, command, tree, capability)
        if status != 0:
            print("\n".join(output.splitlines()[-SHOWN:]))
            passed = False
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="random calls for each instruction set")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--capabilities", nargs="+", choices=CAPABILITIES, default=CAPABILITIES)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "sanitized", help="folder that is built in")
    arguments = parser.parse_args()
    folder = arguments.build.resolve()
    tree = folder / "tree"
    link_tree(compile_module(folder / "cmake", folder / "module"), tree)
    passed = faults_are_found(tree)
    for capability in arguments.capabilities:
        if not capability_exists(tree, capability):
            print(f"{capability}: this processor does not have it; not run")
            continue
        passed = watched_runs(tree, capability, arguments.cases, arguments.seed) and passed
    print("no error was found" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
