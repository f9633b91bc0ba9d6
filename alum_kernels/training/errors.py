"""What keeps a training from being done as asked; the messages are for people, one line each."""


class TrainingError(ValueError):
    """Settings, data, a model or a checkpoint that cannot be used."""


class WriteError(TrainingError):
    """A file that the system does not take, such as on a full disk."""


class MethodError(TrainingError):
    """A method that cannot be applied to a model."""
