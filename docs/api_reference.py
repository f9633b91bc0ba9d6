"""The API reference as HTML pages, made from the docstrings: what is public, and nothing that is not.

    python -m docs.api_reference [--output docs-output]

Needs pdoc and the frameworks of the integrations (``pip install 'alum-kernels[docs]'``): a module that cannot be
imported is an error, so that no page is missing in silence.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pdoc
import pdoc.docstrings
import pdoc.render

import alum_kernels

PACKAGES = ("alum_kernels", "alum_kernels.adversarial", "alum_kernels.evaluation", "alum_kernels.integrations")
PRIVATE = (
    r"!alum_kernels\.adversarial\.(?!(captured|config|heads|objectives|output|presets|schedule|telemetry)$)",
    r"!alum_kernels\.integrations\.(finite_steps|rescaled_ascent|step_watch|trainer_\w+)$",
)
"""Modules that nobody outside calls; every other one, and each package, has a page."""


def sections_of_fields(docstring: str) -> list[str]:
    """Headings of a config's docstring below which fields are listed, other than those of every docstring."""
    headings = re.findall(r"^\s*([A-Z][A-Za-z ]+):\n\s+\w[\w, ]*: ", docstring, re.MULTILINE)
    return [heading for heading in headings if heading not in pdoc.docstrings.GOOGLE_LIST_SECTIONS]


def write_pages(folder: Path, packages: Sequence[str] = PACKAGES) -> None:
    """A page a public module of the packages, an index and a search, into a folder."""
    pdoc.docstrings.GOOGLE_LIST_SECTIONS += sections_of_fields(alum_kernels.AdversarialConfig.__doc__ or "")
    pdoc.render.configure(docformat="google", show_source=False, footer_text="alum_kernels")
    pdoc.pdoc(*packages, *PRIVATE, output_directory=folder)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m docs.api_reference", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("docs-output"), help="folder of the pages (%(default)s)")
    folder = parser.parse_args().output
    write_pages(folder)
    print(f"written: {folder / 'index.html'} ({len(list(folder.rglob('*.html')))} pages)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
