"""The set for rejection-sampling fine-tuning: a model's own right completions.

Of each question at most so many different ones, drawn at random: by lemma 2.1 of the
paper any right completion is a sample of the best-of-N policy.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oreal_jax.data.cleaning import words
from oreal_jax.data.prompts import read_rows, text_field
from oreal_jax.errors import InputError

VERDICTS = ("right", "wrong", "undecided")


class Solution(NamedTuple):
    """A right completion of a question."""

    id: str
    question: str
    solution: str


class Harvest(NamedTuple):
    """The solutions taken, of how many right completions to how many questions."""

    solutions: list[Solution]
    completions: int
    right: int
    different: int
    questions: int
    solved: int

    def __str__(self) -> str:
        return (
            f"{self.completions} completions, {self.right} right, {self.different} of "
            f"them different; {self.solved} of {self.questions} questions solved; "
            f"{len(self.solutions)} solutions kept"
        )


def harvest(rows: Iterable[Mapping[str, Any]], keep: int, seed: int = 0) -> Harvest:
    """At most `keep` different right completions of each question.

    `rows` have `id, question, completion, verdict`. Completions that differ in spacing
    or case alone are the same. The draw depends on (seed, question) only.
    """
    right: dict[str, list[Solution]] = {}
    completions = 0
    for row in rows:
        completions += 1
        of_question = right.setdefault(row["question"], [])
        if row["verdict"] == "right":
            solution = Solution(row["id"], row["question"], row["completion"])
            of_question.append(solution)
    taken, different = [], 0
    for question, solutions in right.items():
        unlike = {words(each.solution): each for each in reversed(solutions)}
        unlike = list(unlike.values())[::-1]
        different += len(unlike)
        random = np.random.default_rng((seed, zlib.crc32(question.encode())))
        drawn = random.permutation(len(unlike))[:keep]
        taken += [unlike[place] for place in sorted(drawn)]
    return Harvest(
        taken,
        completions,
        sum(map(len, right.values())),
        different,
        len(right),
        sum(bool(solutions) for solutions in right.values()),
    )


def read_completions(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Judged completions of files that `oreal data pass-rate` or `oreal eval` wrote.

    Raises:
        InputError: naming file, line, field and value.
    """
    found = []
    for path in paths:
        for name, row in read_rows(path):
            texts = {
                field: text_field(name, row, field) for field in ("id", "question")
            }
            if not isinstance(row.get("completion"), str):
                raise InputError(
                    f"{name}: field 'completion' is {row.get('completion')!r}, "
                    "expected text"
                )
            if row.get("verdict") not in VERDICTS:
                raise InputError(
                    f"{name}: field 'verdict' is {row.get('verdict')!r}, expected "
                    f"{', '.join(VERDICTS)}"
                )
            found.append(row | texts)
    return found
