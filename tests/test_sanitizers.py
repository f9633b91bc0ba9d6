"""The tree in which the sanitizers' module takes the place of the usual one; ``make sanitize`` runs it."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from sanitizers import build, faults

from alum_kernels.backends.native import load

MODULE, REASON = load()


@pytest.mark.skipif(MODULE is None, reason=f"native module: {REASON}")
def test_programs_in_the_tree_import_the_module_that_was_put_there(tmp_path):
    """Here a link to the usual module under the same name; everything beside it is the checkout's."""
    other = tmp_path / "elsewhere" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    other.parent.mkdir()
    other.symlink_to(Path(MODULE.__file__))
    tree = tmp_path / "tree"
    for _ in range(2):  # the second time over the first
        build.link_tree(other, tree)
    code = "import torch, alum_kernels._C as module, tests.fuzzing as beside; print(module.__file__, beside.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=True)
    module, package = done.stdout.split()
    assert Path(module) == tree / "alum_kernels" / other.name
    assert (tree / "alum_kernels" / other.name).readlink() == other
    assert Path(package).resolve() == build.ROOT / "tests" / "fuzzing" / "__init__.py"
    assert {entry.name for entry in (build.ROOT / "csrc").iterdir()} == {e.name for e in (tree / "csrc").iterdir()}
    assert Path(MODULE.__file__).exists()


def test_a_planted_fault_that_is_not_found_fails_the_run(monkeypatch, capsys):
    """An unwatched module goes on after a fault, or ends without the report."""
    from sanitizers import __main__ as program

    answers = {"outside": (99, f"==1==ERROR: {faults.REPORTS['outside']} on address"), "misaligned": (0, "nothing")}
    monkeypatch.setattr(program, "run", lambda name, command, tree, capability: answers[command[-1]])
    assert not program.faults_are_found(Path())
    assert faults.REPORTS["misaligned"] in capsys.readouterr().out
    answers["misaligned"] = (99, f"token_noise.h:36: {faults.REPORTS['misaligned']} 0x1")
    assert program.faults_are_found(Path())
