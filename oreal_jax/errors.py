"""Errors that end a command with one clear message instead of a traceback."""


class InputError(ValueError):
    """Invalid input: names the file, the field and the value (exit code 2)."""


class Failure(RuntimeError):
    """The work cannot continue although the input is valid (exit code 1)."""


class Diverged(Failure):
    """The models are no longer usable: their state must not be saved."""


def summarize(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
