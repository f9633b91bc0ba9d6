"""Figures as the page writes them; None, which nothing was measured for, is a dash."""

import math
from typing import Any

from ..table import milliseconds

DASH = "–"


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits, without an exponent where that is short.

    Example:
        >>> [number(x) for x in (1234.5, 0.5, 0.00012, 3, None)]
        ['1234', '0.5', '0.00012', '3', '–']
    """
    if value is None:
        return DASH
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    if abs(value) >= 10**digits and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def times(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}×"


def percent(share: float | None) -> str:
    """Whole percent; one decimal below ten."""
    return DASH if share is None else f"{100 * share:.0f} %" if abs(share) >= 0.0995 else f"{100 * share:.1f} %"


def signed_percent(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:+.3g} %"


def ms(timing: dict[str, Any] | None) -> str:
    """Median milliseconds."""
    return DASH if timing is None else milliseconds(timing["median_s"])


def span(timing: dict[str, Any] | None) -> str:
    """Milliseconds from the 20th to the 80th percentile."""
    return DASH if timing is None else f"{milliseconds(timing['p20_s'])}–{milliseconds(timing['p80_s'])}"


def mebibytes(size: float | None) -> str:
    if size is None:
        return DASH
    value = size / 2**20
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def error(value: float | None) -> str:
    """Two significant digits: 4.5e-2."""
    if value is None:
        return DASH
    return f"{value:.1e}".replace("e-0", "e-").replace("e+00", "").replace("e+0", "e+")


def seconds_tick(value: float) -> str:
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= size * 0.9999:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def bytes_tick(value: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} B"


def count_tick(value: float) -> str:
    """Powers of two with a K of 1024, others with digits."""
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:.4g}K"
    return f"{value:g}"
