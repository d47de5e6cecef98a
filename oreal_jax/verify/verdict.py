"""Completions to verify, their verdicts, and verdicts read from files."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from oreal_jax.errors import InputError

Outcome = Literal["correct", "incorrect", "undecided"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
# The words in files that were written before November 2026.
OLD_WORDS: dict[str, Outcome] = {"right": "correct", "wrong": "incorrect"}


class Candidate(NamedTuple):
    """A completion to verify; `finish_reason` is "stop" if it ends in a stop token.

    `prompt` is the row of its prompt, for verifiers that read more than the gold
    answer.
    """

    question: str
    gold_answer: str
    text: str
    finish_reason: str = "stop"
    prompt: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """An outcome, a short readable reason, and who decided.

    `by` is "rule", the name of another verifier, "judge", "truncated" (no stop token),
    "timeout" or "crash" (the verifier failed or its process died).
    """

    outcome: Outcome
    reason: str
    by: str = "rule"

    @classmethod
    def truncated(cls) -> "Verdict":
        """Return the verdict on a completion without stop token, whatever its text."""
        return cls("incorrect", "no stop token", "truncated")


# Judges a completion of a prompt, given as a row with `gold_answer`.
Verifier = Callable[[str, Mapping[str, Any]], Verdict]


class Undecided(ValueError):
    """No comparison may decide; the message becomes the reason of the verdict."""


def read_outcome(where: str, row: Mapping[str, Any]) -> Outcome:
    """Read the outcome from the field `verdict` of a file's row.

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
