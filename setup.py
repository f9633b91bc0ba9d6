"""Builds the native module with CMake and Ninja where a compiler and torch are; a pure Python install otherwise.

Environment:
    ALUM_NATIVE    0 skips the native module, 1 fails where it cannot be built; unset builds it where it can
    ALUM_CUDA      0 leaves CUDA kernels out, 1 fails without nvcc; unset includes them where nvcc is
    ALUM_CUDA_ARCHITECTURES  semicolon-separated, such as "80;90a"; unset takes the list in CMakeLists.txt
    ALUM_WERROR    1 turns compiler warnings into errors

What was built, or why nothing was, is left in ``alum_kernels/_build.json``.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
VERSION = (ROOT / "VERSION").read_text().strip()


# cmake and ninja of this interpreter's own packages come before the system's, wherever its folder is.
SEARCH_PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
DEMANDED = os.environ.get("ALUM_NATIVE") == "1" or os.environ.get("ALUM_CUDA") == "1"


def find_nvcc() -> str | None:
    """Path of nvcc: of CUDACXX, of CUDA_HOME, or on the PATH."""
    named = os.environ.get("CUDACXX")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [named, f"{home}/bin/nvcc" if home else None, "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def obstacle() -> str | None:
    """What keeps the native module from being built here, or None."""
    if sys.platform != "linux":
        return f"it is built on Linux only, this is {sys.platform}"
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return "no C++ compiler was found"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch was not importable in the build environment (install it first, then use --no-build-isolation)"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 was not importable in the build environment"
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool, path=SEARCH_PATH) is None]
    return f"{' and '.join(missing)} not on the PATH" if missing else None


def plan() -> tuple[bool, str]:
    """Whether to build the native module, and the line that records why."""
    wanted = os.environ.get("ALUM_NATIVE")
    if wanted == "0":
        return False, "skipped: ALUM_NATIVE=0"
    reason = obstacle()
    if reason is None:
        return True, "built"
    if DEMANDED:
        raise SystemExit(f"alum_kernels: the native module was demanded, but {reason}")
    return False, f"skipped: {reason}"


BUILD_NATIVE, RECORD = plan()


def leave_record(package: Path, text: str) -> None:
    """The line that tells the installed package, and the person installing, what was built."""
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build.json").write_text(json.dumps({"native": text}) + "\n")
    print(f"alum_kernels: native module {text}", file=sys.stderr)


class RecordBuild(build_py):
    """Leaves the record where nothing is built; else the build does."""

    def run(self) -> None:
        super().run()
        if not BUILD_NATIVE:
            leave_record((ROOT if self.editable_mode else Path(self.build_lib)) / "alum_kernels", RECORD)


class BuildNative(build_ext):
    """Runs CMake, whose one target is the module. A build that fails is recorded, unless it was demanded."""

    def build_extension(self, ext: Extension) -> None:
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        try:
            self.run_cmake(ext)
        except subprocess.CalledProcessError as error:
            if DEMANDED:
                raise SystemExit(
                    f"alum_kernels: the native module was demanded, but its build failed: {error}"
                ) from error
            leave_record(
                ROOT / "alum_kernels" if self.editable_mode else package, f"skipped: the build failed: {error}"
            )
        else:
            leave_record(ROOT / "alum_kernels" if self.editable_mode else package, RECORD)

    def run_cmake(self, ext: Extension) -> None:
        import pybind11
        import torch
        from torch.utils import cpp_extension

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        folder = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        folder.mkdir(parents=True, exist_ok=True)
        options = {
            "ALUM_OUTPUT": output,
            "ALUM_VERSION": VERSION,
            "ALUM_TORCH_VERSION": torch.__version__,
            "ALUM_TORCH_INCLUDE": ";".join(cpp_extension.include_paths("cpu")),
            "ALUM_TORCH_LIB": ";".join(cpp_extension.library_paths("cpu")),
            "ALUM_WERROR": "ON" if os.environ.get("ALUM_WERROR") == "1" else "OFF",
            # of the torch beside which the package is installed, not of the one that it was built against
            "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
            "CMAKE_INSTALL_RPATH": "$ORIGIN/../torch/lib",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            **self.cuda_options(),
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        cmake, environment = shutil.which("cmake", path=SEARCH_PATH), {**os.environ, "PATH": SEARCH_PATH}
        subprocess.run([cmake, "-G", "Ninja", "-S", ROOT, "-B", folder, *defines], check=True, env=environment)
        subprocess.run([cmake, "--build", folder], check=True, env=environment)

    def cuda_options(self) -> dict[str, str]:
        wanted, nvcc = os.environ.get("ALUM_CUDA"), find_nvcc()
        if wanted == "1" and nvcc is None:
            raise SystemExit("alum_kernels: ALUM_CUDA=1, but no nvcc was found (set CUDACXX or CUDA_HOME)")
        if wanted == "0" or nvcc is None:
            return {"ALUM_CUDA": "OFF"}
        architectures = os.environ.get("ALUM_CUDA_ARCHITECTURES", "")
        return {"ALUM_CUDA": "ON", "CMAKE_CUDA_COMPILER": nvcc, "ALUM_CUDA_ARCHITECTURES": architectures}


BENCHMARKS = [f"alum_kernels.{name}" for name in find_packages(str(ROOT), include=["benchmarks*"])]

setup(
    packages=find_packages(str(ROOT), include=["alum_kernels*"]) + BENCHMARKS,
    package_dir={"alum_kernels.benchmarks": "benchmarks"},
    ext_modules=[Extension("alum_kernels._C", sources=[], optional=not DEMANDED)] if BUILD_NATIVE else [],
    cmdclass={"build_py": RecordBuild, "build_ext": BuildNative},
)
