"""What the distributions hold, and that an installed package runs without a checkout."""

import ast
import configparser
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import alum_kernels
from alum_kernels import __main__ as command_line
from alum_kernels.backends import native

ROOT = Path(__file__).parents[1]
FOLDERS = (".ci", "alum_kernels", "benchmarks", "csrc", "docs", "examples", "tests")
FILES = (
    ".clang-format", "CHANGELOG.md", "CITATION.cff", "CMakeLists.txt", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in",
    "Makefile", "README.md", "VERSION", "pyproject.toml", "setup.py",
)  # fmt: skip
MADE = shutil.ignore_patterns("__pycache__", "*.py[cod]", "*.so", "_build.json", ".*_cache", ".hypothesis")


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources without what was made from them."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=MADE)
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="module")
def distributions(tree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the source distribution, and with the pure wheel that was built from it."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("dist")
    wanted = files_under(tree)
    # what a checkout has besides, from an earlier build
    (tree / "alum_kernels" / "_build.json").write_text("{}")
    (tree / "alum_kernels" / "_C.so").write_bytes(b"")
    (tree / "build").mkdir()
    (tree / "build" / "left.txt").write_text("")
    build(tree, "sdist", "--dist-dir", str(folder))
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    (root,) = (folder / "unpacked").iterdir()
    made = {"PKG-INFO", "setup.cfg"}
    found = {name for name in files_under(root) if not name.startswith("alum_kernels.egg-info/")}
    assert found - made == wanted
    build(root, "bdist_wheel", "--dist-dir", str(folder))
    return folder


def build(folder: Path, *command: str, native: str = "0") -> None:
    environment = {**os.environ, "ALUM_NATIVE": native, "ALUM_CUDA": "0"}
    command = (sys.executable, "setup.py", "-q", *command)
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.fixture(scope="module")
def installed(distributions) -> Path:
    """What the wheel puts into a site-packages folder."""
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(distributions / "site")
    return distributions / "site"


INSTALLED = """
import contextlib, importlib, json, sys
# an editable install would offer the modules of its checkout where the installed package has none
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import torch
import alum_kernels
from alum_kernels.backends import native
from alum_kernels.benchmarks import gpu_check, machine
from alum_kernels.benchmarks.report import __main__ as report

a, b = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.2, 0.8]]).log()
shown = {
    "files": [alum_kernels.__file__, machine.__file__],
    "divergence": alum_kernels.symmetric_kl(a, b).item(),
    "native": native.load()[1],
    "commit": machine.commit(),
    "report": report.main([sys.argv[1], "--output", "page.html"]),
}
with open("gpu_check.txt", "w") as said, contextlib.redirect_stderr(said):
    sys.argv = ["gpu_check"]
    shown["gpu_check"] = gpu_check.main()
try:
    importlib.import_module("alum_kernels.benchmarks.quality")
except ModuleNotFoundError as error:
    shown["quality"] = str(error)
json.dump(shown, open("shown.json", "w"))
"""


@pytest.fixture(scope="module")
def shown(installed) -> dict:
    """What an installed package does in a folder of a repository that is not its own."""
    folder = installed.parent / "elsewhere"
    folder.mkdir()
    subprocess.run(["git", "init", "-q", installed.parent], check=True)
    results = ROOT / "benchmarks" / "results" / "amd-epyc-2-threads-ops.json"
    ran = subprocess.run(
        [sys.executable, "-c", INSTALLED, results],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return {"folder": folder, **json.loads((folder / "shown.json").read_text())}


def test_a_wheel_without_the_native_module_is_pure(distributions):
    (wheel,) = distributions.glob("*.whl")
    assert wheel.name == f"alum_kernels-{alum_kernels.__version__}-py3-none-any.whl"


def test_the_wheel_holds_the_package_and_the_benchmarks_and_nothing_else(installed):
    found = {name for name in files_under(installed) if ".dist-info/" not in name}
    wanted = {name for name in files_under(ROOT / "alum_kernels") if name.endswith((".py", "py.typed"))}
    wanted |= {f"benchmarks/{name}" for name in files_under(ROOT / "benchmarks") if name.endswith((".py", ".css"))}
    assert found == {f"alum_kernels/{name}" for name in wanted | {"_build.json"}}
    assert (installed / "alum_kernels" / "_build.json").read_text() == '{"native": "skipped: ALUM_NATIVE=0"}\n'


def test_the_command_is_installed(installed):
    (folder,) = installed.glob("*.dist-info")
    scripts = configparser.ConfigParser()
    scripts.read(folder / "entry_points.txt")
    assert dict(scripts["console_scripts"]) == {"alum-kernels": "alum_kernels.__main__:main"}
    assert callable(command_line.main)


def test_an_installed_package_computes_and_says_why_it_has_no_native_module(installed, shown):
    assert all(Path(file).is_relative_to(installed) for file in shown["files"])
    assert shown["divergence"] == pytest.approx(1.2 * math.log(4), rel=4e-6)
    assert shown["native"] == "not built: skipped: ALUM_NATIVE=0"


def test_installed_benchmarks_run_and_are_of_no_commit(shown):
    assert shown["commit"] == "unknown"
    assert shown["report"] == 0
    assert (ROOT / "benchmarks" / "report" / "style.css").read_text() in (shown["folder"] / "page.html").read_text()


def test_programs_that_need_a_checkout_say_so(shown):
    assert "quality needs the folder examples/, which is not installed: run python -m" in shown["quality"]
    assert shown["gpu_check"] == 2
    said = (shown["folder"] / "gpu_check.txt").read_text()
    assert said == "gpu-check: it builds and tests the sources: run make gpu-check in a checkout\n"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("readelf") is None, reason="reading libraries needs readelf")
@pytest.mark.skipif(native.load()[0] is None, reason=f"native module: {native.load()[1]}")
def test_a_native_wheel_is_of_one_python_and_platform_and_takes_torch_from_beside_itself(distributions, tmp_path):
    (root,) = (distributions / "unpacked").iterdir()
    shutil.copytree(root, tmp_path / "source")
    build(tmp_path / "source", "bdist_wheel", "--dist-dir", str(tmp_path), native="1")
    (wheel,) = tmp_path.glob("*.whl")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"alum_kernels-{alum_kernels.__version__}-{python}-{python}-{platform}.whl"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "site")
    libraries = [path for path in (tmp_path / "site").rglob("*") if ".so" in path.suffixes]
    (module,) = libraries  # libtorch is torch's to bring: a process must have one of it
    assert module.parent == tmp_path / "site" / "alum_kernels"
    assert json.loads((module.parent / "_build.json").read_text()) == {"native": "built"}
    section = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"\(R(?:UN)?PATH\).*\[(.*)\]", section) == ["$ORIGIN/../torch/lib"]
    assert {"libtorch.so", "libtorch_cpu.so"} <= set(re.findall(r"\(NEEDED\).*\[(.*)\]", section))
    loads = "import torch, alum_kernels._C as module; print(module.__file__, module.build_info()['version'])"
    ran = subprocess.run(
        [sys.executable, "-c", loads],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == [str(module), alum_kernels.__version__]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda path: path.name)
def test_benchmarks_import_each_other_relatively(path):
    """So that they are the same modules as ``benchmarks`` and as ``alum_kernels.benchmarks``."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        assert not [name for name in names if name.split(".")[0] == "benchmarks"], f"{path.name}:{node.lineno}"


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = (ROOT / "VERSION").read_text().strip()
    assert alum_kernels.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
    (torch,) = [line for line in project["dependencies"] if line.startswith("torch")]
    define = (ROOT / "CMakeLists.txt").read_text()
    assert f'ALUM_TORCH_TARGET="{torch.removeprefix("torch>=")}"' in define
