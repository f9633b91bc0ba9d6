"""Plots of the robustness figures of ``alum_kernels.evaluation``, each from the reports alone.

Every function returns a (title, PNG in base64) pair, as the pages of :mod:`examples.report` embed it.
"""

import base64
import io
from collections.abc import Mapping
from typing import Any

from alum_kernels.evaluation import LossIncreaseComparison, RobustnessReport, SmoothnessReport

Plot = tuple[str, str]


def pyplot() -> Any:
    """``matplotlib.pyplot`` on a backend that needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plots

    return plots


def encoded(figure: Any) -> str:
    """The figure as PNG in base64; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, bbox_inches="tight")
    pyplot().close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def loss_increase(comparison: LossIncreaseComparison, title: str = "Largest increase of the loss") -> Plot:
    """A box a model: median and quartiles over the compared samples, whiskers over all of them."""
    names = list(comparison.reports)
    figure, axis = pyplot().subplots(figsize=(8, 0.9 + 0.5 * len(names)))
    boxes = []
    for name in names:
        increases, quartiles = comparison.increases(name), comparison.quartiles(name)
        boxes.append(
            {
                "label": name,
                "whislo": float(increases.min()),
                "q1": quartiles.lower,
                "med": quartiles.median,
                "q3": quartiles.upper,
                "whishi": float(increases.max()),
            }
        )
    axis.bxp(boxes, orientation="horizontal", showfliers=False, widths=0.5)
    axis.invert_yaxis()
    axis.set(title=f"{title} ({comparison.samples} samples)", xlabel="loss increase: median, quartiles, range")
    return title, encoded(figure)


def accuracy_curves(
    curves: Mapping[str, Mapping[str, Mapping[float, RobustnessReport]]],
    title: str = "Accuracy under attack by radius",
) -> Plot:
    """Accuracy against radius, an axis a norm and a line a model.

    Args:
        curves: of each norm and model, a report a radius: ``curves["l2"]["standard"][0.1]``. The clean accuracy is
            drawn at radius 0.
        title: of the plot.
    """
    figure, axes = pyplot().subplots(1, len(curves), figsize=(6 * len(curves), 3.6), squeeze=False, sharey=True)
    for axis, (norm, models) in zip(axes[0], curves.items(), strict=True):
        for name, reports in models.items():
            radii = sorted(reports)
            shares = [reports[radii[0]].clean_accuracy, *(reports[radius].attacked_accuracy for radius in radii)]
            axis.plot([0.0, *radii], shares, marker="o", label=name)
        axis.set(title=f"{norm} ball", xlabel="radius", ylim=(0, 1))
        axis.locator_params(axis="x", nbins=6)
        axis.legend()
    axes[0][0].set_ylabel("accuracy")
    figure.suptitle(title)
    return title, encoded(figure)


def smoothness(reports: Mapping[str, SmoothnessReport], title: str = "Local smoothness") -> Plot:
    """Mean divergence of the predictions at random and at ascended perturbations, a pair of points a model."""
    figure, axis = pyplot().subplots(figsize=(8, 0.9 + 0.5 * len(reports)))
    places = list(range(len(reports)))
    random = [report.random_mean for report in reports.values()]
    ascended = [report.ascended_mean for report in reports.values()]
    axis.hlines(places, random, ascended, color="#999", linewidth=1)
    axis.plot(random, places, "o", label="random")
    axis.plot(ascended, places, "o", label="ascended")
    axis.set_yticks(places, list(reports))
    axis.set(title=title, xlabel="mean symmetric KL inside the ball, less is smoother", xscale="log")
    axis.margins(y=0.3)
    axis.invert_yaxis()
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return title, encoded(figure)
