"""Published data sets, which no checkout has: tests read them whole where they are.

``ALUM_DATA`` names their folder, with GLUE's tasks in ``glue/`` and the NCBI disease corpus in ``ncbi-disease/``;
without it ``shared/data`` beside the checkout is looked for.
"""

import os
from pathlib import Path

import pytest

PUBLISHED = Path(os.environ.get("ALUM_DATA", Path(__file__).parents[2] / "shared" / "data"))

needs_published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason=f"{PUBLISHED} is not there: published GLUE and NCBI disease files"
)
