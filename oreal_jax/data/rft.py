"""The set for rejection-sampling fine-tuning: a model's own correct completions.

Solutions are chosen at random: by lemma 2.1 of the paper any correct completion is a
sample of the best-of-N policy.
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


class RftSet(NamedTuple):
    """The selected solutions, and counts of the completions that they are from."""

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


def select_solutions(
    rows: Iterable[Mapping[str, Any]], limit: int, seed: int = 0
) -> RftSet:
    """Select at most `limit` different correct completions of each question.

    `rows` have `id, question, completion, verdict`. Completions that differ only in
    spacing or case are the same. The choice depends only on (seed, question).
    """
    correct: dict[str, list[Solution]] = {}
    completions = 0
    for row in rows:
        completions += 1
        solutions = correct.setdefault(row["question"], [])
        if row["verdict"] == "correct":
            solutions.append(Solution(row["id"], row["question"], row["completion"]))
    selected, different = [], 0
    for question, solutions in correct.items():
        # Of equal solutions the first, at the place of the last.
        first = {words(s.solution): s for s in reversed(solutions)}
        candidates = list(reversed(first.values()))
        different += len(candidates)
        random = np.random.default_rng((seed, zlib.crc32(question.encode())))
        chosen = random.permutation(len(candidates))[:limit]
        selected += [candidates[index] for index in sorted(chosen)]
    counts = [len(solutions) for solutions in correct.values()]
    return RftSet(
        selected,
        completions,
        sum(counts),
        different,
        len(counts),
        sum(map(bool, counts)),
    )


def read_completions(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Read verified completions that `oreal data pass-rate` or `oreal eval` wrote.

    Raises:
        InputError: names file, line, field and value.
    """
    completions = []
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
            completions.append(row | texts | {"verdict": read_outcome(name, row)})
    return completions
