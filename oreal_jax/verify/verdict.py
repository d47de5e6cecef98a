"""What a judge says of a completion."""

import dataclasses
from typing import Literal

Outcome = Literal["right", "wrong", "undecided"]


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
        """A completion without its stop token is wrong, whatever it says."""
        return cls("wrong", "no stop token", "truncated")
