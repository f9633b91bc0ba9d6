"""What the documents name is there: command lines, programs and their options, files and make targets."""

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import tiny_models
import torch
from processes import group_of_one
from torch.nn.parallel import DistributedDataParallel

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.commands.parser import OneLineParser

ROOT = Path(__file__).parents[1]
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "benchmarks" / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
README = DOCUMENTS["README.md"]
WRITTEN = r"[a-z-]+-output/|/results/.*\*|\.html$"
"""Files that a program writes."""

PROGRAM = r"python -m ((?:benchmarks|examples|docs)\.\w+)([^`]*)"
WITH_PROGRAMS = [name for name, text in DOCUMENTS.items() if re.search(PROGRAM, text)]


def named(pattern: str, text: str) -> list[str]:
    return sorted(set(re.findall(pattern, text)))


COMMAND_LINES = [
    line.split("  #")[0].removeprefix("alum-kernels ").strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("alum-kernels ")
]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_a_command_line_is_accepted(line):
    """By its command's parser; nothing is run."""
    command, *words = shlex.split(line)
    parser = OneLineParser(prog=command)
    importlib.import_module(f"alum_kernels.commands.{command}").add_arguments(parser)
    assert parser.parse_args(words)


def test_there_is_something_to_hold_the_documents_to():
    assert {"README.md", "benchmarks/README.md", "docs/performance.md"} <= set(WITH_PROGRAMS)
    assert {line.split()[0] for line in COMMAND_LINES} == {"train", "evaluate", "bench", "report"}


@pytest.mark.parametrize("name", WITH_PROGRAMS)
def test_programs_and_their_options_are_there(name):
    for program, words in re.findall(PROGRAM, DOCUMENTS[name]):
        found = importlib.util.find_spec(program)
        assert found is not None, program
        if found.submodule_search_locations:  # a package is run by its __main__
            found = importlib.util.find_spec(f"{program}.__main__")
        source = Path(found.origin).read_text() + (ROOT / "benchmarks" / "machine_options.py").read_text()
        for option in named(r"(?<!\S)--[a-z][\w-]*", words.split("\n\n")[0]):
            assert f'"{option}"' in source, f"{program} {option}"


def test_examples_named_without_their_package_are_there():
    (listed,) = re.findall(r"on real text: `python -m examples\.([^.]*)\.", README)
    assert all(importlib.util.find_spec(f"examples.{example}") for example in re.findall(r"\w+", listed))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_and_make_targets_are_there(name):
    text = DOCUMENTS[name]
    folders = "alum_kernels|benchmarks|csrc|docs|examples|tests"
    paths = named(rf"(?<![\w./])(?:{folders})/[\w./*<>{{}},-]*\w", text)
    assert paths
    for path in paths:
        if not re.search(r"[<{*]", path) and not re.search(WRITTEN, path):
            assert (ROOT / path).exists(), path
    for path in named(r"\]\(([\w./]+)\)", text):
        assert ((ROOT / name).parent / path).exists(), path
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in named(r"`make ([a-z-]+)", text):
        assert target in targets, target


def test_the_loop_over_processes_runs(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", DOCUMENTS["docs/distributed.md"], re.DOTALL)
    model = tiny_models.bert()
    names = {
        "torch": torch,
        "DistributedDataParallel": DistributedDataParallel,
        "AdversarialObjective": AdversarialObjective,
        "model": model,
        "config": AdversarialConfig.alum_finetuning(),
        "batch": tiny_models.classification_batch(),
    }
    with group_of_one(tmp_path):
        exec(block, names)
    assert all(parameter.grad is not None for parameter in model.parameters())
