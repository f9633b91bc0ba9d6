"""What is wrong with a file, by its place."""


class CorpusError(ValueError):
    """A corpus that cannot be read; the message names the place."""
