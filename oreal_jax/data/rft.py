"""The set for rejection-sampling fine-tuning: a model's own correct completions.

Of each question at most so many different ones, drawn at random: by lemma 2.1 of the
paper any correct completion is a sample of the best-of-N policy.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oreal_jax.data.cleaning import words
from oreal_jax.errors import InputError
from oreal_jax.files import read_rows, text_field
from oreal_jax.verify.verdict import read_outcome


class Solution(NamedTuple):
    """A correct completion of a question."""

    id: str
    question: str
    solution: str


class Harvest(NamedTuple):
    """The solutions taken, of how many correct completions to how many questions."""

    solutions: list[Solution]
    completions: int
    correct: int
    different: int
    questions: int
    solved: int

    def __str__(self) -> str:
        return (
            f"{self.completions} completions, {self.correct} correct, "
            f"{self.different} of them different; {self.solved} of {self.questions} "
            f"questions solved; {len(self.solutions)} solutions kept"
        )


def harvest(rows: Iterable[Mapping[str, Any]], keep: int, seed: int = 0) -> Harvest:
    """At most `keep` different correct completions of each question.

    `rows` have `id, question, completion, verdict`. Completions that differ in spacing
    or case alone are the same. The draw depends on (seed, question) only.
    """
    correct: dict[str, list[Solution]] = {}
    completions = 0
    for row in rows:
        completions += 1
        of_question = correct.setdefault(row["question"], [])
        if row["verdict"] == "correct":
            solution = Solution(row["id"], row["question"], row["completion"])
            of_question.append(solution)
    taken, different = [], 0
    for question, solutions in correct.items():
        unlike = {words(each.solution): each for each in reversed(solutions)}
        unlike = list(unlike.values())[::-1]
        different += len(unlike)
        random = np.random.default_rng((seed, zlib.crc32(question.encode())))
        drawn = random.permutation(len(unlike))[:keep]
        taken += [unlike[place] for place in sorted(drawn)]
    return Harvest(
        taken,
        completions,
        sum(map(len, correct.values())),
        different,
        len(correct),
        sum(bool(solutions) for solutions in correct.values()),
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
            found.append(row | texts | {"verdict": read_outcome(name, row)})
    return found
