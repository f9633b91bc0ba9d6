"""The API reference is made from the docstrings, with every public name in it."""

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

import alum_kernels
from alum_kernels import evaluation
from alum_kernels.adversarial.config import PRESETS

pytest.importorskip("pdoc")
from docs import api_reference

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages that need no framework but torch."""
    folder = tmp_path_factory.mktemp("docs-output")
    api_reference.write_pages(folder, [name for name in api_reference.PACKAGES if "integrations" not in name])
    return folder


def text_of(page: Path) -> str:
    """What a reader sees."""
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text()))


def test_every_public_name_has_an_entry(pages):
    page = (pages / "alum_kernels.html").read_text()
    assert [name for name in alum_kernels.__all__ if f'id="{name}"' not in page] == []
    page = (pages / "alum_kernels" / "evaluation.html").read_text()
    assert [name for name in evaluation.__all__ if f'id="{name}"' not in page] == []
    page = (pages / "alum_kernels" / "adversarial" / "presets.html").read_text()
    assert [name for name in PRESETS if f'id="Presets.{name}"' not in page] == []


def test_what_is_private_has_no_page(pages):
    modules = {str(page.relative_to(pages)) for page in pages.rglob("*.html")}
    assert {"alum_kernels/adversarial/objectives.html", "alum_kernels/adversarial/config.html"} <= modules
    assert not [name for name in modules if re.search("backends|benchmarks|passes|hooks|/ops", name)]


def test_sections_and_formulas_are_rendered(pages):
    config = pages / "alum_kernels" / "adversarial" / "config.html"
    assert "loss = clean_weight L(e) + adversarial_weight L(e + delta) + alpha D(f(e + delta), f(e))" in text_of(config)
    assert "<strong>proximal_interval:</strong>" in config.read_text()  # of a section that only this docstring has
    package = pages / "alum_kernels.html"
    assert "<strong>adv_logits:</strong>" in package.read_text()
    assert re.search(r"<h6[^>]*>Raises:</h6>", package.read_text())
    assert ":func:" not in text_of(package)


@pytest.mark.slow
def test_the_command_writes_every_page(tmp_path):
    pytest.importorskip("transformers")
    command = [sys.executable, "-m", "docs.api_reference", "--output", tmp_path]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "Warning" not in ran.stderr, ran.stderr[-3000:]
    modules = {path.stem for path in (ROOT / "alum_kernels" / "integrations").glob("[a-z]*.py")}
    parts = {"finite_steps", "rescaled_ascent", "step_watch"}  # of other integrations
    parts |= {name for name in modules if name.startswith("trainer_")}
    assert modules - parts == {page.stem for page in (tmp_path / "alum_kernels" / "integrations").glob("*.html")}
    assert "alum_kernels.html" in (tmp_path / "index.html").read_text()
