"""Figures of the adversary, summed on the device and read without stopping a step.

Steps add device tensors; only :meth:`Telemetry.read` brings them to the host.
"""

import warnings
from collections import Counter

import torch
from torch import Tensor

SIGNAL_RATIO = 2.0
"""J(delta) / J(delta / 2) is 4 for a smooth divergence and 1 for rounding noise; below this it is mostly noise."""


class Telemetry:
    """Running sums over the steps since the last :meth:`read`, each in one place on its device.

    Attributes:
        counts: how often each figure was added. A captured step, which adds on the device alone, counts for itself.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.counts: Counter[str] = Counter()
        self._warned = False

    def add(self, **values: Tensor) -> None:
        """Add device scalars to the sums of their names."""
        for name, value in values.items():
            value = value.detach().to(torch.float32)
            total = self._sums.get(name)
            if total is None or total.device != value.device:
                total = self._sums[name] = torch.zeros_like(value)
            total.add_(value)
            self.counts[name] += 1

    def read(self) -> dict[str, float]:
        """Averages since the last reading; waits for the device once, and starts anew.

        Returns:
            ``divergence`` (mean over rows, per step that had one), ``ascent_gain`` (divergence at the climbed
            perturbation over that at the noise it started from), ``delta_rms`` (root mean square of an element of the
            perturbation), ``clipped`` and ``unrepresentable`` (shares of its elements that the projection changed, and
            that the dtype of the embeddings lost), ``non_finite`` (gradient elements, a step), ``signal_ratio`` where
            it was measured (0 where half the perturbation changes nothing), ``proximal`` (divergence from the teacher,
            per step), ``task_increase`` of methods that climb the task's loss (its mean at the last perturbation less
            that at the first, a step), ``linearity`` of methods that climb the departure from it (mean gamma of
            ``local_linearity.py`` at the last perturbation, a step; ``ascent_gain`` and ``signal_ratio`` are its),
            ``ascent_cosine`` (of the first ascent gradient in ``ascent_dtype`` and that of the training's precision,
            a signal check).
        """
        names = sorted(self.counts)
        if not names:
            return {}
        total = dict(zip(names, torch.stack([self._sums[name] for name in names]).tolist(), strict=True))
        counts, self.counts = self.counts, Counter()
        for name in names:
            self._sums[name].zero_()
        figures = {}
        if "divergence" in total:
            figures["divergence"] = total["divergence"] / counts["divergence"]
        if total.get("start", 0.0) != 0:  # NaN is shown
            figures["ascent_gain"] = total["end"] / total["start"]
        for name in ("proximal", "task_increase", "linearity", "ascent_cosine"):
            if name in total:
                figures[name] = total[name] / counts[name]
        if total.get("elements", 0.0) > 0:
            elements = total["elements"]
            figures["delta_rms"] = (total["delta_squared"] / elements) ** 0.5
            figures["clipped"] = total["clipped"] / elements
            figures["unrepresentable"] = total["unrepresentable"] / elements
            figures["non_finite"] = total["non_finite"] / counts["non_finite"]
        if "signal_half" in total:
            half = total["signal_half"]
            figures["signal_ratio"] = total["signal_full"] / half if half != 0 else 0.0
            self._warn(figures["signal_ratio"])
        return figures

    def _warn(self, ratio: float) -> None:
        if ratio < SIGNAL_RATIO and not self._warned:
            self._warned = True
            warnings.warn(
                f"J(delta) / J(delta / 2) is {ratio:.2f}, where a signal has about 4: "
                "epsilon lies in the rounding noise of the training precision; raise it or train in fp32",
                stacklevel=3,
            )
