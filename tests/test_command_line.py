"""``python -m alum_kernels`` tells the truth about this machine."""

import json
import os
import subprocess
import sys

import alum_kernels
from alum_kernels import __main__ as command_line
from alum_kernels.backends import native


def output(*arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "alum_kernels", *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_versions_devices_and_the_default_of_every_op_are_printed():
    text = output(TRITON_INTERPRET="0")
    assert f"alum_kernels {alum_kernels.__version__}" in text
    for function, _, _ in command_line.OPS:
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [function]][:1]
        assert line.count("default") == 1
    assert "triton: CPU tensors need the interpreter: set TRITON_INTERPRET=1" in text


def test_json_agrees_with_dispatch():
    facts = json.loads(output("--json", TRITON_INTERPRET="1"))
    served = facts["devices"]["cpu"]["ops"]["symmetric_kl"]
    module, _ = native.load()
    assert served["native" if module else "reference"] == "default"
    assert served["triton"] == "yes"
    assert facts["devices"]["cpu"]["ops"]["js"]["native"].startswith("js is served by the reference")


def test_a_missing_native_module_is_named_with_its_reason():
    code = (
        "import sys; sys.modules['alum_kernels._C'] = None\n"
        "from alum_kernels import __main__ as m; print('\\n'.join(m.lines(m.report())))"
    )
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    assert "native module" in text
    (line,) = [line for line in text.splitlines() if line.split()[:1] == ["noise_init"]]
    assert line.split()[1] == "default"
    assert "native: does not load" in text or "native: not built" in text
