"""Prompts fit to train on: plain answers, each question once, none of a test set.

    normalise answers -> drop duplicates -> drop overlaps with evaluation sets

Questions are compared as lists of words, in which case, spacing and the punctuation of
prose do not count, but signs and numbers do: "2 + 3" is not "2 * 3".
"""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from oreal_jax.data.prompts import Prompt
from oreal_jax.verify.extract import boxed

NGRAM = 13  # words in a row that two questions of independent origin do not share
MOST_VALUES = 50  # a label of more values is text, not a kind
WORD = re.compile(
    r"(?<![\w.])[.,]\d+|\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’]+(?=\s*[(^]))?"  # f'(x)
    r"|[^\s\w$.,;:?\"'’]|_"
)
WHOLE = re.compile(r"[-+]?\d+\.0+")


class Removal(NamedTuple):
    """A prompt that was left out, and why; `like` names what it is like."""

    prompt: Prompt
    reason: str
    like: str

    def as_json(self) -> dict[str, Any]:
        """One JSON line."""
        return {"reason": self.reason, "like": self.like} | self.prompt.as_json()


class Cleaned(NamedTuple):
    """What is left, what is not, and how many answers were rewritten."""

    prompts: list[Prompt]
    removed: list[Removal]
    answers_changed: int

    def statistics(self) -> dict[str, Any]:
        """Plain JSON values about the prompts and how they came to be."""
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
    """The prompts after all three passes; `evaluations` are test sets by name."""
    normal = [
        dataclasses.replace(p, gold_answer=normalised_answer(p.gold_answer))
        for p in prompts
    ]
    changed = sum(
        new.gold_answer != old.gold_answer
        for new, old in zip(normal, prompts, strict=True)
    )
    single, removed = without_duplicates(normal)
    kept, more = without_overlaps(single, evaluations, ngram)
    return Cleaned(kept, removed + more, changed)


def normalised_answer(text: str) -> str:
    r"""The answer itself: of a solution what follows "####" or is boxed last, without
    dollar signs around it or a full stop behind it, 27.0 as 27.

    Text that would lose everything stays as it is.
    """
    answer = text
    if "####" in answer:
        answer = answer.rsplit("####", 1)[1]
    elif boxes := boxed(answer):
        answer = boxes[-1].strip()
    answer = " ".join(answer.split()).removesuffix(".").strip()
    for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        inner = answer[len(left) : -len(right)]
        if answer.startswith(left) and answer.endswith(right) and left not in inner:
            answer = inner.strip()
    if WHOLE.fullmatch(answer):
        answer = answer.partition(".")[0]
    return answer or text


def words(question: str) -> tuple[str, ...]:
    """What two spellings of one question have in common."""
    return tuple(WORD.findall(question.casefold()))


def without_duplicates(
    prompts: Sequence[Prompt],
) -> tuple[list[Prompt], list[Removal]]:
    """The first of each question; none where copies disagree about the answer, since
    nobody knows which is right."""
    copies: dict[tuple[str, ...], list[Prompt]] = {}
    for prompt in prompts:
        copies.setdefault(words(prompt.question), []).append(prompt)
    kept, removed = [], []
    for first, *others in copies.values():
        if any(other.gold_answer != first.gold_answer for other in others):
            same = [first, *others]
            removed += [Removal(p, "contradictory answers", first.id) for p in same]
        else:
            kept.append(first)
            removed += [Removal(p, "duplicate", first.id) for p in others]
    return kept, removed


def without_overlaps(
    prompts: Sequence[Prompt],
    evaluations: Mapping[str, Sequence[Prompt]],
    ngram: int,
) -> tuple[list[Prompt], list[Removal]]:
    """The prompts that share no `ngram` words in a row with a question of a test set;
    with one of fewer words only an equal question overlaps."""
    seen: dict[tuple[str, ...], str] = {}
    for name, questions in evaluations.items():
        for question in questions:
            for gram in _grams(words(question.question), ngram):
                seen.setdefault(gram, f"{name}: {question.id}")
    kept, removed = [], []
    for prompt in prompts:
        grams = _grams(words(prompt.question), ngram)
        like = next((seen[gram] for gram in grams if gram in seen), None)
        if like is None:
            kept.append(prompt)
        else:
            removed.append(Removal(prompt, f"overlap with {like.split(':')[0]}", like))
    return kept, removed


def _grams(of: tuple[str, ...], size: int) -> list[tuple[str, ...]]:
    """All runs of `size` words, or all words where there are fewer."""
    return [of[i : i + size] for i in range(max(1, len(of) - size + 1))]


def statistics(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What prompts look like: lengths, pass rates by tenths, labels of few values."""
    lengths = [len(prompt.question) for prompt in prompts]
    rates = [p.pass_rate for p in prompts if p.pass_rate is not None]
    found: dict[str, Any] = {"prompts": len(prompts)}
    if lengths:
        low, middle, high = np.quantile(lengths, [0.0, 0.5, 1.0])
        found["question_characters"] = {
            "least": int(low),
            "median": float(middle),
            "most": int(high),
        }
    if rates:
        counts, _ = np.histogram(rates, bins=10, range=(0, 1))
        found["pass_rate"] = {
            "measured": len(rates),
            "mean": float(np.mean(rates)),
            "by_tenths": counts.tolist(),
        }
    labels: dict[str, collections.Counter] = {}
    for prompt in prompts:
        for field in prompt.labels:
            labels.setdefault(field, collections.Counter()).update(prompt.values(field))
    found["labels"] = {
        field: dict(counter.most_common())
        for field, counter in sorted(labels.items())
        if len(counter) <= MOST_VALUES
    }
    return found
