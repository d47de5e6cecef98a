"""The one exception that means: the input is wrong and a person can mend it."""


class BadInput(ValueError):
    """A message that names the file, the field and the value (exit code 2)."""
