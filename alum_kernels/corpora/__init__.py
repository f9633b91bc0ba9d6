"""Training data and settings from files. Whatever is wrong with one is a :class:`CorpusError` that names its place."""

from alum_kernels.corpora.labelled import Labelled, read_labelled
from alum_kernels.corpora.paragraphs import read_paragraphs
from alum_kernels.corpora.settings import read_settings
from alum_kernels.corpora.text import CorpusError

__all__ = ["CorpusError", "Labelled", "read_labelled", "read_paragraphs", "read_settings"]
