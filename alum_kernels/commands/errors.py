"""What a command says where it cannot do what it was asked for: one line, and an exit code."""


class CommandError(ValueError):
    """Ends the program with a line and without a traceback.

    Args:
        message: the line.
        status: exit code; 2 where the request is at fault.
    """

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status
