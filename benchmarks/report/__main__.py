"""One self-contained HTML page from result files: nothing is timed, and no machine is asked.

    python -m benchmarks.report benchmarks/results/*.json [--output report.html]

Files of any machine, commit and benchmark stand beside each other. A file that is not what its benchmark writes is an
error that names the file and what is expected; the exit status is 2 and no page is written.
"""

import argparse
import sys
from pathlib import Path

from .files import ReportError, read
from .page import page


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__spec__.parent}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, help="files that the benchmarks wrote with --json")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        files = [read(path) for path in options.results]
    except ReportError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page(files), encoding="utf-8")
    print(f"written: {options.output} ({len(files)} result files)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
