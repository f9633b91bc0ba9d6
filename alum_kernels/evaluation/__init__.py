"""What a trained model withstands."""

from alum_kernels.evaluation.flipping_radius import FlippingRadius, smallest_flipping_radius
from alum_kernels.evaluation.loss_increase import (
    LossIncrease,
    LossIncreaseComparison,
    compare_loss_increase,
    compare_reports,
    largest_loss_increase,
)
from alum_kernels.evaluation.quartiles import Quartiles
from alum_kernels.evaluation.robustness import RobustnessReport, accuracy_under_attack
from alum_kernels.evaluation.search import Radius
from alum_kernels.evaluation.smoothness import SmoothnessReport, local_smoothness

__all__ = [
    "FlippingRadius",
    "LossIncrease",
    "LossIncreaseComparison",
    "Quartiles",
    "Radius",
    "RobustnessReport",
    "SmoothnessReport",
    "accuracy_under_attack",
    "compare_loss_increase",
    "compare_reports",
    "largest_loss_increase",
    "local_smoothness",
    "smallest_flipping_radius",
]
