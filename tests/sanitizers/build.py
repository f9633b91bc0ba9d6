"""A native module that is watched while it runs, in a copy of the tree in which it takes the place of the usual one.

The copy is of links: ``alum_kernels`` with every file but the usual module, and everything else of the checkout beside
it, so that tests and programs started there import the watched module and nothing of them is written twice.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
SANITIZERS = "address;undefined"


def compile_module(folder: Path, output: Path) -> Path:
    """Configure and build in ``folder``; the module, in ``output``.

    Raises:
        subprocess.CalledProcessError: CMake fails; its output is shown.
    """
    import pybind11
    import torch
    from torch.utils import cpp_extension

    options = {
        "ALUM_OUTPUT": output,
        "ALUM_VERSION": (ROOT / "VERSION").read_text().strip(),
        "ALUM_TORCH_VERSION": torch.__version__,
        "ALUM_TORCH_INCLUDE": ";".join(cpp_extension.include_paths("cpu")),
        "ALUM_TORCH_LIB": ";".join(cpp_extension.library_paths("cpu")),
        "ALUM_CUDA": "OFF",
        "ALUM_SANITIZE": SANITIZERS,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    cmake, environment = shutil.which("cmake", path=search), {**os.environ, "PATH": search}
    if cmake is None:
        raise RuntimeError("cmake: expected it beside the interpreter or on the PATH, found none")
    folder.mkdir(parents=True, exist_ok=True)
    defines = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run([cmake, "-G", "Ninja", "-S", ROOT, "-B", folder, *defines], check=True, env=environment)
    subprocess.run([cmake, "--build", folder], check=True, env=environment)
    return output / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def link_tree(module: Path, tree: Path) -> None:
    """Make ``tree`` anew: links to the checkout, with ``module`` in the package."""
    if tree.exists():
        shutil.rmtree(tree)  # links are removed, not what they lead to
    package = tree / "alum_kernels"
    package.mkdir(parents=True)
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("alum_kernels", "build"):
            (tree / entry.name).symlink_to(entry)
    for entry in (ROOT / "alum_kernels").iterdir():
        if not entry.name.startswith("_C.") and entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    (package / module.name).symlink_to(module)


def runtime() -> str:
    """The libraries that must be loaded before the interpreter's own, as the compiler that built the module names them.

    Raises:
        RuntimeError: the compiler has none.
    """
    compiler = os.environ.get("CXX", "c++")
    paths = []
    for library in ("libasan.so", "libubsan.so"):
        named = subprocess.run([compiler, f"-print-file-name={library}"], capture_output=True, text=True, check=True)
        path = Path(named.stdout.strip())
        if not path.is_absolute():
            raise RuntimeError(f"{compiler}: expected {library} beside it, found none")
        paths.append(str(path.resolve()))
    return ":".join(paths)


def watched_environment(capability: str) -> dict[str, str]:
    """Of a process in which the first error ends it, with a stack; leaks are the interpreter's, and not looked for."""
    return {
        **os.environ,
        "LD_PRELOAD": runtime(),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1:exitcode=99",
        "ALUM_CPU_CAPABILITY": capability,
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "2",
    }
