"""The error that a user's mistake raises: one line with cause, number, file and key, remedy."""


class UserError(Exception):
    """A mistake in the input; the command line prints it as one line and exits with code 2."""


class InterruptedWork(BaseException):
    """A signal ended a stage early; the command line prints the line and exits with 128 plus the signal's `number`."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def out_of_memory(error: BaseException) -> bool:
    """Whether Python, numpy or torch got no memory; torch says so on a processor in words only."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, without torch
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def mendable(error: BaseException) -> bool:
    """Whether the same call may succeed later: an interrupt, an error of the system (a full disk), too little room."""
    causes = (error, error.__cause__, error.__context__)
    system = any(isinstance(cause, OSError) for cause in causes)
    return not isinstance(error, Exception) or out_of_memory(error) or system


def nearest(name: str, known: list[str]) -> str:
    """Return the hint `; did you mean X? known: ...` for a misspelt `name`."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}known: {', '.join(sorted(known))}"
