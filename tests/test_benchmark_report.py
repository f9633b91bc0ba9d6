"""The benchmarks' page: made from result files alone, complete, and readable on a phone and on a desk."""

import copy
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.report.__main__ import main

RESULTS = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*.json"))
MACHINE = {
    "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef+changes", "device": "cpu", "cpu": "Some <CPU>",
    "logical_cpus": 2, "threads": 2, "load_average": 0.1, "platform": "Linux", "python": "3.12",
    "packages": {"torch": "2.11"}, "native": {}, "gpu": None,
}  # fmt: skip
GPU = {**MACHINE, "device": "cuda", "gpu": {"name": "A GPU", "driver": "1.2", "clocks": {"sm_mhz": 1980}}}


def timing(median: float) -> dict:
    return {"median_s": median, "p20_s": 0.9 * median, "p80_s": 1.2 * median, "repeats": 1, "samples_s": [median]}


def step_row(provider: str, mode: str = "eager", median: float | None = 0.1, **changes) -> dict:
    row = {
        "shape": "minilm-cls-16x64", "task": "classification", "model": "MiniLM", "batch": 16, "length": 64,
        "provider": provider, "mode": mode, "timing": None if median is None else timing(median),
        "of_standard": None if median is None else median / 0.1, "flop_bound": 2.68, "of_bound": 1.017,
        "peak_bytes": 3 * 2**20, "model_share": 0.91, "kernel_share": 0.012, "launches": 432, "not_run": None,
    }  # fmt: skip
    return {**row, **changes}


FILES = {
    "step": {
        "machine": GPU, "rounds": 15,
        "results": [
            step_row("standard"), step_row("naive", median=0.31), step_row("ours", median=0.2725),
            step_row("ours, captured", median=None, not_run="no <GPU> here"),
            step_row("standard", "compiled", 0.05, of_standard=1.0),
            step_row("ours", "compiled", 0.14, of_standard=2.8),
        ],
    },
    "estimators": {
        "machine": MACHINE, "batches": 64,
        "results": [
            {
                "estimator": "adversarial_fraction", "setting": "0.25", "task": "classification", "cost": 1.4375,
                "cost_bound": 1.4167, "bias": -0.0123, "bias_low": -0.0456, "bias_high": 0.021, "bias_squared": 0.001,
                "variance": 1.25, "cosine": 0.5, "batches": 64, "unbiased": True,
                "changes": "A quarter of the samples & no more.",
            },
            {
                "estimator": "ascent_depth", "setting": "3", "task": "classification", "cost": 1.9, "cost_bound": 1.83,
                "bias": -0.9, "bias_low": -0.95, "bias_high": -0.85, "bias_squared": 0.8, "variance": 0.1,
                "cosine": 0.6, "batches": 64, "unbiased": False, "changes": "Another regulariser.",
            },
        ],
    },
    "memory": {
        "machine": MACHINE,
        "results": [
            {
                "method": method, "task": "classification", "batch": 16, "length": 64, "peak_bytes": size * 2**20,
                "activation_bytes": size * 2**20, "of_standard": size / 200, "activations_of_standard": size / 200,
                "forwards": 3, "note": "",
            }
            for method, size in (("standard", 200), ("alum_finetuning", 394), ("alum, memory low", 203))
        ],
    },
    "pass-costs": {
        "machine": MACHINE,
        "results": [
            {
                "shape": "minilm-cls-16x64", "fraction": 0.25, "floor_of_standard": 1.4911,
                "bound_at_fraction": 1.4201, "timings": {"standard": timing(0.48), "part": timing(0.1234)},
            }
        ],
    },
    "growth": {
        "machine": MACHINE,
        "results": [
            {
                "op": "symmetric_kl", "axis": "V", "size": size, "fixed": {"N": 64}, "provider": provider,
                "timing": timing(size * factor), "peak_bytes": 8 * size, "bytes_moved": 16 * size, "not_run": None,
            }
            for provider, factor in (("eager", 3e-6), ("ours", 1e-6))
            for size in (1000, 2000, 4000)
        ],
    },
    "gpu-check": {
        "machine": GPU, "stages": [{"name": "tests", "outcome": "failed", "seconds": 12.5, "detail": "2 failed"}],
    },
    "weather": {"machine": MACHINE, "rain": [1, 2, 3]},
}  # fmt: skip


def write(folder: Path, kind: str, content: dict | None = None, name: str | None = None) -> Path:
    path = folder / f"{name or kind}.json"
    path.write_text(json.dumps({"benchmark": kind, **(FILES[kind] if content is None else content)}))
    return path


def page_of(*paths: Path, folder: Path) -> str:
    output = folder / "out" / "report.html"
    assert main([*map(str, paths), "--output", str(output)]) == 0
    return output.read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """What a reader sees, in one line."""
    without_style = re.sub(r"<(style|title).*?</\1>", " ", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", without_style)).split())


def test_published_results_make_a_page(tmp_path):
    text = text_of(page_of(*RESULTS, folder=tmp_path))
    for path in RESULTS:
        assert path.name in text
        assert json.loads(path.read_text())["machine"]["commit"][:12] in text
    ops = next(json.loads(path.read_text()) for path in RESULTS if path.name.endswith("-ops.json"))
    for row in ops["results"]:
        assert row["op"] in text
        median = 1e3 * row["timings"]["native"]["median_s"]
        assert f"{median:.1f}" in text or f"{median:.3f}" in text


def test_every_figure_of_a_step_is_that_of_the_file(tmp_path):
    text = text_of(page_of(write(tmp_path, "step"), folder=tmp_path))
    for words in ("272.5", "2.73×", "2.68×", "1.02×", "91 %", "1.2 %", "432", "3.00", "not run: no <GPU> here"):
        assert words in text, words
    assert "2.80×" in text, "a compiled step is compared with the compiled standard one"


def test_passes_and_their_sum(tmp_path):
    text = text_of(page_of(write(tmp_path, "pass-costs"), folder=tmp_path))
    assert "0.25 of the batch: the passes take 1.49× a standard step, counted 1.42×" in text
    assert "forward and backward, the chosen samples 2 123" in text


def test_estimators_memory_growth_and_what_is_not_known(tmp_path):
    kinds = ("estimators", "memory", "pass-costs", "growth", "gpu-check", "weather")
    text = text_of(page_of(*(write(tmp_path, kind) for kind in kinds), folder=tmp_path))
    for words in (
        "adversarial_fraction", "A quarter of the samples & no more.", "Another regulariser.", "1.44×",
        "alum, memory low", "1.01×", "1.97×", "203", "symmetric_kl", "failed", "2 failed", "weather",
        "rain (3 elements)",
    ):  # fmt: skip
        assert words in text, words


def test_sections_are_there_only_where_a_file_is(tmp_path):
    page = page_of(write(tmp_path, "memory"), folder=tmp_path)
    assert re.findall(r'<section id="([^"]*)"', page) == ["machines", "memory"]


def test_files_of_two_machines_stand_side_by_side(tmp_path):
    other = {**copy.deepcopy(FILES["memory"]), "machine": GPU}
    other["results"][1]["of_standard"] = 1.77
    paths = (write(tmp_path, "memory"), write(tmp_path, "memory", other, "other"))
    text = text_of(page_of(*paths, folder=tmp_path))
    assert "Side by side" in text
    assert "1.97×" in text
    assert "1.77×" in text


def test_whatever_a_file_says_stays_text(tmp_path):
    evil = copy.deepcopy(FILES["memory"])
    evil["results"][0]["method"] = "<script>alert(1)</script>"
    evil["machine"] = {**MACHINE, "cpu": '"><img src=x onerror=alert(1)>'}
    page = page_of(write(tmp_path, "memory", evil), folder=tmp_path)
    assert "<script" not in page
    assert "<img" not in page
    assert "<script>alert(1)</script>" in text_of(page)


def test_steps_of_the_older_form_are_shown_and_called_older(tmp_path):
    row = {"task": "masked_lm", "step": "ours", "batch": 4, "length": 8, "timing": timing(0.2), "of_standard": 2.0}
    older = {"machine": MACHINE, "results": [{**row, "step": "standard", "of_standard": 1.0}, row]}
    text = text_of(page_of(write(tmp_path, "step", older), folder=tmp_path))
    assert "older" in text
    assert "2.00×" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON"),
        ("[" * 99999, "expected JSON"),
        ("[]", "expected an object with the key 'benchmark'"),
        ('{"benchmark": "memory", "machine": 3}', "expected the facts of the machine"),
        ('{"benchmark": "memory", "machine": {}}', "expected the key 'results'"),
        ('{"benchmark": "memory", "machine": {}, "results": [{"method": 3}]}', "results[0].method: expected text"),
    ],
)
def test_a_file_that_is_none_is_named(content, message, tmp_path, capsys):
    path = tmp_path / "broken.json"
    path.write_text(content)
    output = tmp_path / "report.html"
    assert main([str(path), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert "broken.json" in error
    assert message in error
    assert not output.exists()
    assert main([str(tmp_path / "absent.json"), "--output", str(output)]) == 2
    assert "absent.json: No such file" in capsys.readouterr().err


# in a browser

HARNESS = """<!doctype html><meta charset="utf-8"><body><script>
const widths = %s, found = [];
function next() {
  if (!widths.length) { document.title = "done"; document.body.textContent = JSON.stringify(found); return; }
  const width = widths.shift(), frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:800px;border:0`;
  frame.onload = () => {
    const page = frame.contentDocument, root = page.documentElement;
    const sizes = [...page.querySelectorAll("main *")].filter(e => e.childNodes.length && [...e.childNodes].some(
      c => c.nodeType === 3 && c.textContent.trim()) && !e.closest("svg")).map(
      e => parseFloat(frame.contentWindow.getComputedStyle(e).fontSize));
    found.push({width, content: root.scrollWidth, inner: frame.contentWindow.innerWidth,
      sections: [...page.querySelectorAll("section")].filter(s => s.getBoundingClientRect().height > 40).map(s => s.id),
      smallest: Math.min(...sizes), drawings: page.querySelectorAll("svg").length});
    frame.remove(); next();
  };
  frame.src = "report.html"; document.body.append(frame);
}
next();
</script>"""


def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None and os.environ.get("ALUM_EXPECT_CHROMIUM") == "1":
        pytest.fail("ALUM_EXPECT_CHROMIUM=1, and there is no chromium on the PATH")
    if found is None:
        pytest.skip("no chromium on the PATH")
    return found


def test_a_browser_shows_all_of_it_on_a_phone_and_on_a_desk(tmp_path):
    chromium = browser()
    paths = [write(tmp_path, kind) for kind in FILES]
    page_of(*RESULTS, *paths, folder=tmp_path)
    folder = tmp_path / "out"
    (folder / "harness.html").write_text(HARNESS % [360, 1200])
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=20000",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (folder / "harness.html").as_uri(),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "<title>done</title>" in run.stdout, run.stdout[-500:] + run.stderr[-2000:]
    found = json.loads(html.unescape(re.search(r"<body>(.*)</body>", run.stdout, re.S).group(1)))
    kinds = {json.loads(path.read_text())["benchmark"] for path in [*RESULTS, *paths]} - {"weather"}
    for view in found:
        assert view["content"] <= view["inner"] == view["width"]
        assert set(view["sections"]) == {"machines", "other", *kinds}
        assert view["smallest"] >= 12
        assert view["drawings"] > 5
    assert [view["width"] for view in found] == [360, 1200]
    assert "CONSOLE" not in run.stderr, run.stderr[-2000:]
    page = (folder / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:,)', page), "nothing is loaded from elsewhere"


def test_the_package_needs_no_torch_to_make_the_page():
    sources = Path(report.__file__).parent.glob("*.py")
    assert not [path.name for path in sources if re.search(r"^\s*(import|from) torch", path.read_text(), re.M)]
