"""What keeps a training from being done as asked; the messages are for people, one line each."""


class TrainingError(ValueError):
    """Settings, data, a model or a checkpoint that cannot be used."""


class MethodError(TrainingError):
    """A method that cannot be applied to a model."""
