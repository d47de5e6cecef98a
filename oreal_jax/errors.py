"""What stops a verb with one clear message instead of a trace."""


class InputError(ValueError):
    """The input is wrong and a person can mend it: a message that names the file, the
    field and the value (exit code 2)."""


class Failure(RuntimeError):
    """The input is good, the work cannot go on: what was seen and what bounds it (exit
    code 1)."""


class Diverged(Failure):
    """The models are no longer usable: their state must not be saved."""
