"""Plots of the robustness figures are made from the reports, and the report's table has them."""

import base64

import pytest
import torch

pytest.importorskip("matplotlib")

from alum_kernels.evaluation import LossIncrease, RobustnessReport, SmoothnessReport, compare_reports
from examples import report, robustness_plots
from examples.training import Run


def increase(values, correct) -> LossIncrease:
    largest = torch.tensor(values, dtype=torch.float64)
    everything = torch.ones(len(values), dtype=torch.bool)
    return LossIncrease(torch.zeros_like(largest), largest, torch.tensor(correct), everything, largest * 0 + 0.1)


def smooth(scale: float) -> SmoothnessReport:
    random = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64) * scale
    return SmoothnessReport(random, 4 * random, torch.ones(3, dtype=torch.bool))


REPORTS = {
    "standard": increase([1.0, 2.0, 3.0, 4.0], [True, True, True, False]),
    "ours": increase([0.1, 0.2, 0.3, 9.0], [True, True, True, True]),
}


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the figures that were encoded, kept open."""
    kept, encode = [], robustness_plots.encoded

    def keep(figure):
        kept.append(figure.axes)
        return encode(figure)

    monkeypatch.setattr(robustness_plots, "encoded", keep)
    return kept


def is_png(image: str) -> bool:
    return base64.b64decode(image).startswith(b"\x89PNG")


def test_a_box_has_the_median_and_quartiles_of_the_shared_samples(drawn):
    title, image = robustness_plots.loss_increase(compare_reports(REPORTS), "increase")
    assert title == "increase"
    assert is_png(image)
    (axis,) = drawn[0]
    xs = [line.get_xdata() for line in axis.lines]
    for name, median in (("standard", 2.0), ("ours", 0.2)):
        assert any(list(x) == [median, median] for x in xs), name
    assert max(float(max(x)) for x in xs) == 3.0  # the sample that only one gets right is left out
    assert [label.get_text() for label in axis.get_yticklabels()] == ["standard", "ours"]
    assert "(3 samples)" in axis.get_title()


def test_a_curve_starts_at_the_clean_accuracy_and_is_in_order_of_the_radius(drawn):
    def point(attacked: float) -> RobustnessReport:
        return RobustnessReport(0.9, attacked, 0.1, 0.2, 0.0, 10)

    models = {"standard": {0.2: point(0.3), 0.1: point(0.6)}, "ours": {0.1: point(0.8)}}
    _, image = robustness_plots.accuracy_curves({"l2": models, "linf": {"ours": {0.5: point(0.1)}}})
    assert is_png(image)
    left, right = drawn[0]
    assert [list(line.get_xdata()) for line in left.lines] == [[0.0, 0.1, 0.2], [0.0, 0.1]]
    assert [list(line.get_ydata()) for line in left.lines] == [[0.9, 0.6, 0.3], [0.9, 0.8]]
    assert list(right.lines[0].get_ydata()) == [0.9, 0.1]
    assert right.get_title() == "linf ball"


def test_smoothness_is_a_pair_of_points_a_model(drawn):
    _, image = robustness_plots.smoothness({"standard": smooth(1.0), "ours": smooth(0.1)})
    assert is_png(image)
    (axis,) = drawn[0]
    found = {line.get_label(): list(line.get_xdata()) for line in axis.lines}
    assert found["random"] == pytest.approx([3.0, 0.3])
    assert found["ascended"] == pytest.approx([12.0, 1.2])


def test_the_table_compares_what_all_methods_get_right(tmp_path):
    runs = [
        Run("task", name, [0], [1.0], [0.1], loss_increase=found, smoothness=smooth(1.0))
        for name, found in REPORTS.items()
    ]
    alone = Run("masked LM", "x", [0], [1.0], [0.1], loss_increase=increase([5.0, 7.0], [False, False]))
    columns = [report.COLUMNS.index(name) for name in ("loss increase", "largest KL")]
    cells = [[row[column] for column in columns] for row in report.table([*runs, alone])]
    assert cells == [["2.000", "12"], ["0.200", "12"], ["6.000", "-"]]
    report.write_html([*runs, alone], {}, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 + 3
    assert "masked LM: largest increase of the loss, all samples" in page
