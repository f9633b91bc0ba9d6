"""``python -m alum_kernels``: what it says of this machine, its commands, and what it says to wrong requests."""

import json
import os
import subprocess
import sys

import pytest

import alum_kernels
from alum_kernels import __main__ as command_line
from alum_kernels.backends import native
from alum_kernels.commands import info
from alum_kernels.commands.benchmark_programs import PACKAGES


def output(*arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "alum_kernels", *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_versions_devices_and_the_default_of_every_op_are_printed():
    text = output(TRITON_INTERPRET="0")
    assert f"alum_kernels {alum_kernels.__version__}" in text
    for function, _, _ in info.OPS:
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [function]][:1]
        assert line.count("default") == 1
    assert "triton: CPU tensors need the interpreter: set TRITON_INTERPRET=1" in text


def test_json_agrees_with_dispatch():
    facts = json.loads(output("--json", TRITON_INTERPRET="1"))
    served = facts["devices"]["cpu"]["ops"]["symmetric_kl"]
    module, _ = native.load()
    assert served["native" if module else "reference"] == "default"
    assert served["triton"] == "yes"
    for name in ("js", "squared_hellinger"):
        said = f"{name} is served by the reference backend only" if module else served["native"]
        assert facts["devices"]["cpu"]["ops"][name]["native"] == said


def test_a_missing_native_module_is_named_with_its_reason():
    code = (
        "import sys; sys.modules['alum_kernels._C'] = None\n"
        "from alum_kernels.commands import info as m; print('\\n'.join(m.lines(m.report())))"
    )
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    assert "native module" in text
    (line,) = [line for line in text.splitlines() if line.split()[:1] == ["noise_init"]]
    assert line.split()[1] == "default"
    assert "native: does not load" in text or "native: not built" in text


needs_native = pytest.mark.skipif(native.load()[0] is None, reason=f"native module: {native.load()[1]}")


def layout(text: str, op: str, capability: str) -> list[str]:
    """The cells of one architecture under one op."""
    (part,) = [part for part in text.split("\n\n") if part.startswith(op)]
    (line,) = [line for line in part.splitlines() if line.split()[0] == capability]
    return line[21:].split()


@needs_native
def test_the_plan_of_a_vocabulary():
    text = output("plan", "--vocab", "50265", "--dtype", "bf16")
    assert layout(text, "symmetric_kl", "9.0")[:3] == ["staged", "2", "384"]
    assert layout(text, "linear_symmetric_kl", "9.0")[:3] == ["staged", "4", "384"]
    assert layout(text, "symmetric_kl", "8.0")[:3] == ["streamed", "1", "768"]
    assert "symmetric_kl: 4,096 rows of 50,265 classes in bf16, 196.3 KiB for both logits of a row" in text
    assert "staged    both rows in shared memory" in text
    for capability in ("8.6", "8.9", "10.0", "12.0"):
        assert layout(text, "symmetric_kl", capability)
    # few rows are split further; one architecture alone
    text = output("plan", "--vocab", "50265", "--rows", "8", "--device-capability", "9.0")
    assert layout(text, "symmetric_kl", "9.0")[:2] == ["staged", "8"]
    assert "8.0" not in text
    assert layout(output("plan", "--vocab", "3"), "symmetric_kl", "8.0")[0] == "tile"


@needs_native
def test_a_plan_fits_its_device():
    """Slices cover a row, fit the shared memory, and blocks the registers."""
    module, _ = native.load()
    for capability, shared_kib, most in ((80, 163, 1), (86, 99, 1), (90, 227, 8), (100, 227, 8), (120, 99, 8)):
        for columns in (1, 64, 65, 129, 1000, 2048, 30522, 50265, 128256, 256000, 1 << 20):
            for element_bytes in (2, 4):
                for rows in (1, 16, 100, 4096):
                    plan = module.row_plan(columns, element_bytes, rows, capability, shared_kib * 1024, 132)
                    assert plan["shared_bytes"] <= shared_kib * 1024
                    assert plan["threads"] % 32 == 0
                    assert plan["resident"] >= 1
                    assert plan["resident"] * plan["threads"] * (40 if columns <= 64 else 80) <= 65536
                    assert plan["blocks_per_row"] in (1, 2, 4, 8)
                    assert plan["blocks_per_row"] <= most
                    assert (plan["path"] == "tile") == (columns <= 64)
                    if plan["path"] == "staged":
                        assert plan["blocks_per_row"] * plan["side_bytes"] >= columns * element_bytes
                    linear = module.row_plan(columns, 4, rows, capability, shared_kib * 1024, 132, linear=True)
                    assert linear["path"] != "tile"


def test_the_plan_without_a_native_module_says_why():
    code = (
        "import sys; sys.modules['alum_kernels._C'] = None; sys.argv = ['x', 'plan', '--vocab', '50265']\n"
        "from alum_kernels import __main__ as m; sys.exit(m.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "plan: the launch plan needs the native module: " in done.stderr
    assert "not built: " in done.stderr or "does not load: " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--vocab"),
        (("--vocab", "0"), "expected a whole number of at least 1, got '0'"),
        (("--vocab", "9", "--dtype", "fp64"), "fp64"),
    ],
)
def test_a_plan_of_nothing_is_refused(arguments, message):
    command = [sys.executable, "-m", "alum_kernels", "plan", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize("given", [["--help"], ["-h"]])
def test_the_overview_names_every_command(given, capsys):
    assert command_line.main(given) == 0
    printed = capsys.readouterr().out
    for name, about in command_line.COMMANDS.items():
        assert f"  {name:8}  {about}" in printed


def test_info_is_the_command_where_none_is_named(capsys):
    assert command_line.main(["--json"]) == 0
    unnamed = json.loads(capsys.readouterr().out)
    assert command_line.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == unnamed


def test_an_unknown_command_and_an_unknown_option_are_named_with_the_nearest(capsys):
    assert command_line.main(["trian"]) == 2
    assert "got 'trian'; the nearest is train" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        command_line.main(["train", "--learing-rate", "1"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "got '--learing-rate'; the nearest is --learning-rate" in error
    assert error.count("\n") == 1


def test_help_of_a_command_is_for_that_command(capsys):
    for name in command_line.COMMANDS:
        with pytest.raises(SystemExit) as ended:
            command_line.main([name, "--help"])
        assert ended.value.code == 0
        assert f"usage: python -m alum_kernels {name}" in capsys.readouterr().out


def test_a_benchmark_gets_what_follows_its_name(capsys, tmp_path):
    path = tmp_path / "flops.json"
    assert command_line.main(["bench", "flops", "--shape", "minilm-cls-16x64", "--json", str(path)]) == 0
    assert "minilm-cls-16x64" in capsys.readouterr().out
    assert json.loads(path.read_text())
    with pytest.raises(SystemExit) as ended:
        command_line.main(["bench", "flops", "--help"])
    assert ended.value.code == 0
    assert "--shape" in capsys.readouterr().out


def test_a_report_is_made_of_files(tmp_path, capsys):
    results = tmp_path / "flops.json"
    page = tmp_path / "page.html"
    assert command_line.main(["report", str(tmp_path / "absent.json"), "--output", str(page)]) == 2
    assert f"got {tmp_path / 'absent.json'}, which is none" in capsys.readouterr().err
    results.write_text("{}")
    assert command_line.main(["report", str(results), "--output", str(page)]) == 2
    assert str(results) in capsys.readouterr().err
    assert not page.exists()


def test_without_the_benchmark_programs_a_line_says_where_they_are(capsys, monkeypatch):
    monkeypatch.setattr("alum_kernels.commands.benchmark_programs.PACKAGES", ("absent_package", "another"))
    assert command_line.main(["bench", "ops"]) == 2
    assert "expected the benchmark program ops in absent_package or another" in capsys.readouterr().err
    assert PACKAGES == ("alum_kernels.benchmarks", "benchmarks")


@pytest.mark.parametrize("given", ["", "--help"])
def test_a_reader_that_leaves_is_no_error(given):
    # the reader is gone before anything is printed
    command = f"set -o pipefail; (sleep 0.3; {sys.executable} -m alum_kernels {given}) | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=120)
    assert done.stderr == ""
    assert done.returncode == command_line.READER_LEFT
