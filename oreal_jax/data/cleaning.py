"""Cleaning of prompts: bare answers, no duplicates, no evaluation questions.

Prompts whose gold text is no answer ("proof", "not found") are removed.

Questions are compared as lists of words. Case, spacing and the punctuation of prose are
ignored, signs and numbers are not: "2 + 3" differs from "2 * 3".
"""

import collections
import dataclasses
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from oreal_jax.data.prompts import Prompt
from oreal_jax.verify.extract import has_answer, marked_answers

NGRAM = 13  # consecutive words that questions of independent origin do not share
MAX_VALUES = 50  # labels with more values are text, not categories
WORD = re.compile(
    r"(?<![\w.])[.,]\d+|\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’]+(?=\s*[(^]))?"  # f'(x)
    r"|[^\s\w$.,;:?\"'’]|_"
)
WHOLE_NUMBER = re.compile(r"[-+]?\d+\.0+")


class Removal(NamedTuple):
    """A removed prompt, the reason, and the name of the similar prompt."""

    prompt: Prompt
    reason: str
    like: str

    def as_json(self) -> dict[str, Any]:
        """Return one JSON line."""
        return {"reason": self.reason, "like": self.like} | self.prompt.as_json()


class Cleaned(NamedTuple):
    """Remaining prompts, removed ones, and the number of rewritten answers."""

    prompts: list[Prompt]
    removed: list[Removal]
    answers_changed: int

    def statistics(self) -> dict[str, Any]:
        """Return JSON values about the prompts and their cleaning."""
        reasons = collections.Counter(removal.reason for removal in self.removed)
        return {
            "read": len(self.prompts) + len(self.removed),
            "removed": dict(sorted(reasons.items())),
            "answers_changed": self.answers_changed,
        } | statistics(self.prompts)


def clean(
    prompts: Sequence[Prompt],
    evaluations: Mapping[str, Sequence[Prompt]],
    ngram: int = NGRAM,
) -> Cleaned:
    """Normalise answers, then remove prompts that are not to be trained on.

    Those are prompts without an answer, duplicates and overlaps with evaluation sets.

    `evaluations` are the prompts of each set, by its name.
    """
    normalised = [
        dataclasses.replace(prompt, gold_answer=normalise_answer(prompt.gold_answer))
        for prompt in prompts
    ]
    changed = sum(map(operator.ne, prompts, normalised))
    answered = [prompt for prompt in normalised if has_answer(prompt.gold_answer)]
    unanswered = [
        Removal(prompt, "gold answer is no answer", "")
        for prompt in normalised
        if not has_answer(prompt.gold_answer)
    ]
    unique, duplicates = remove_duplicates(answered)
    remaining, overlaps = remove_overlaps(unique, evaluations, ngram)
    return Cleaned(remaining, unanswered + duplicates + overlaps, changed)


def normalise_answer(text: str) -> str:
    r"""Return the bare answer.

    Of a solution, that after "####" or in the last box; without surrounding dollar
    signs or a final full stop; 27.0 as 27. Text that would become empty is unchanged.
    """
    answer = text
    if "####" in answer:
        answer = answer.rsplit("####", 1)[1]
    elif marked := marked_answers(answer):
        answer = marked[-1].strip()
    answer = " ".join(answer.split()).removesuffix(".").strip()
    for start, end in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        inner = answer[len(start) : -len(end)]
        if answer.startswith(start) and answer.endswith(end) and start not in inner:
            answer = inner.strip()
    if WHOLE_NUMBER.fullmatch(answer):
        answer = answer.partition(".")[0]
    return answer or text


def words(question: str) -> tuple[str, ...]:
    """Return the words of a question, the same for all of its spellings."""
    return tuple(WORD.findall(question.casefold()))


def remove_duplicates(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Removal]]:
    """Keep the first of equal questions, and none if their answers differ."""
    copies: dict[tuple[str, ...], list[Prompt]] = {}
    for prompt in prompts:
        copies.setdefault(words(prompt.question), []).append(prompt)
    remaining, removed = [], []
    for equal in copies.values():
        first = equal[0]
        if len({prompt.gold_answer for prompt in equal}) > 1:
            removed += [Removal(p, "contradictory answers", first.id) for p in equal]
        else:
            remaining.append(first)
            removed += [Removal(p, "duplicate", first.id) for p in equal[1:]]
    return remaining, removed


def remove_overlaps(
    prompts: Sequence[Prompt],
    evaluations: Mapping[str, Sequence[Prompt]],
    ngram: int,
) -> tuple[list[Prompt], list[Removal]]:
    """Remove prompts that share `ngram` consecutive words with an evaluation question.

    A question of fewer words overlaps only with an equal one.
    """
    names: dict[tuple[str, ...], str] = {}
    for evaluation, questions in evaluations.items():
        for question in questions:
            for gram in _ngrams(question, ngram):
                names.setdefault(gram, f"{evaluation}: {question.id}")
    remaining, removed = [], []
    for prompt in prompts:
        like = next((names[g] for g in _ngrams(prompt, ngram) if g in names), None)
        if like is None:
            remaining.append(prompt)
        else:
            removed.append(Removal(prompt, f"overlap with {like.split(':')[0]}", like))
    return remaining, removed


def _ngrams(prompt: Prompt, size: int) -> list[tuple[str, ...]]:
    """Return all runs of `size` words of a question, or all words of a shorter one."""
    all_words = words(prompt.question)
    count = max(1, len(all_words) - size + 1)
    return [all_words[i : i + size] for i in range(count)]


def statistics(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return question lengths, pass rates by tenths, and counts of label values."""
    lengths = [len(prompt.question) for prompt in prompts]
    rates = [p.pass_rate for p in prompts if p.pass_rate is not None]
    report: dict[str, Any] = {"prompts": len(prompts)}
    if lengths:
        report["question_characters"] = {
            "least": min(lengths),
            "median": float(np.median(lengths)),
            "most": max(lengths),
        }
    if rates:
        counts, _ = np.histogram(rates, bins=10, range=(0, 1))
        report["pass_rate"] = {
            "measured": len(rates),
            "mean": float(np.mean(rates)),
            "by_tenths": counts.tolist(),
        }
    labels: dict[str, collections.Counter] = {}
    for prompt in prompts:
        for field in prompt.labels:
            labels.setdefault(field, collections.Counter()).update(prompt.values(field))
    report["labels"] = {
        field: dict(counter.most_common())
        for field, counter in sorted(labels.items())
        if len(counter) <= MAX_VALUES
    }
    return report
