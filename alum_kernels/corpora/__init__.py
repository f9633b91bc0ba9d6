"""Readers of text for training: labelled examples, paragraphs, settings."""

from alum_kernels.corpora.errors import CorpusError
from alum_kernels.corpora.labelled import Labelled, read_labelled
from alum_kernels.corpora.paragraphs import read_paragraphs
from alum_kernels.corpora.settings import read_settings

__all__ = ["CorpusError", "Labelled", "read_labelled", "read_paragraphs", "read_settings"]
