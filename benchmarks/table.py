"""Tables on a terminal, one line at a time: a long measurement shows what it has."""

from collections.abc import Sequence


class Table:
    """Columns of fixed width; the first ``text_columns`` are words and stand left, the others figures and stand right.

    Example:
        >>> table = Table([("op", 6), ("ms", 5)], text_columns=1)
        op        ms
        >>> table.row("kl", "1.25")
        kl      1.25
    """

    def __init__(self, columns: Sequence[tuple[str, int]], text_columns: int) -> None:
        self._widths = [max(width, len(name)) for name, width in columns]
        self._text_columns = text_columns
        self.row(*(name for name, _ in columns))

    def row(self, *cells: str) -> None:
        placed = [
            cell.ljust(width) if i < self._text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, self._widths, strict=True))
        ]
        print("  ".join(placed).rstrip(), flush=True)


def milliseconds(seconds: float) -> str:
    """Three significant digits or more."""
    value = 1e3 * seconds
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
