"""What a judge says of a completion."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from oreal_jax.errors import InputError

Outcome = Literal["correct", "incorrect", "undecided"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
# The words in files that were written before November 2026.
OLD_WORDS: dict[str, Outcome] = {"right": "correct", "wrong": "incorrect"}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """An outcome, a short reason for a person, and who decided.

    `by` is "rule", "judge", "truncated" (no stop token), "timeout" or "crash" (the
    worker died).
    """

    outcome: Outcome
    reason: str
    by: str = "rule"

    @classmethod
    def truncated(cls) -> "Verdict":
        """A completion without its stop token is incorrect, whatever it says."""
        return cls("incorrect", "no stop token", "truncated")


def read_outcome(where: str, row: Mapping[str, Any]) -> Outcome:
    """The outcome in the field `verdict` of a row of a file.

    Raises:
        InputError: naming `where`, the field and its value.
    """
    value = row.get("verdict")
    outcome = OLD_WORDS.get(value, value) if isinstance(value, str) else None
    if outcome not in OUTCOMES:
        raise InputError(
            f"{where}: field 'verdict' is {value!r}, expected one of "
            f"{', '.join(OUTCOMES)}"
        )
    return outcome
