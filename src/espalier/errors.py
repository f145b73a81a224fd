"""The error that a user's mistake raises: one line with cause, number, file and key, remedy."""


class UserError(Exception):
    """A mistake in the input; the command line prints it as one line and exits with code 2."""


def nearest(name: str, known: list[str]) -> str:
    """Return the hint `; did you mean X? known: ...` for a misspelt `name`."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}known: {', '.join(sorted(known))}"
