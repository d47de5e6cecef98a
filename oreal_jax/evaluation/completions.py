"""Completions of problems: their records and their verdicts."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from oreal_jax.data import Prompt
from oreal_jax.verify import Candidate, Pool, Verdict
from oreal_jax.verify.completions import verify_completions
from oreal_jax.verify.llm_judge import Judge


class CompletionRecord(NamedTuple):
    """A completion's text, its number of tokens, and the reason of its end."""

    completion: str
    tokens: int
    finish_reason: str


# In place of a completion of a problem that leaves no space for one in the model.
TOO_LONG = CompletionRecord("", 0, "too_long")


class VerifiedCompletion(NamedTuple):
    """A completion of a prompt with its verdict."""

    prompt: Prompt
    sample: int
    record: CompletionRecord
    verdict: Verdict

    @property
    def correct(self) -> bool:
        """Whether the verdict is correct; undecided counts as incorrect."""
        return self.verdict.outcome == "correct"

    def as_json(self) -> dict[str, Any]:
        """Return one JSON line."""
        return {
            "id": self.prompt.id,
            "sample": self.sample,
            "question": self.prompt.question,
            "gold_answer": self.prompt.gold_answer,
            **self.record._asdict(),
            "verdict": self.verdict.outcome,
            "reason": self.verdict.reason,
            "by": self.verdict.by,
        }


Groups = Sequence[Sequence[VerifiedCompletion]]  # the completions of each problem


def verify(
    pool: Pool,
    prompts: Sequence[Prompt],
    records: Sequence[Sequence[CompletionRecord]],
    on_progress: Callable[[int], None] = lambda count: None,
    judge: Judge | None = None,
) -> list[list[VerifiedCompletion]]:
    """Verify the completions of each prompt, as `verify_completions` does."""
    candidates = [
        Candidate(
            prompt.question,
            prompt.gold_answer,
            r.completion,
            r.finish_reason,
            prompt.as_json(),
        )
        for prompt, group in zip(prompts, records, strict=True)
        for r in group
    ]
    verdicts = iter(verify_completions(candidates, pool, judge, on_progress))
    return [
        [VerifiedCompletion(prompt, k, r, next(verdicts)) for k, r in enumerate(group)]
        for prompt, group in zip(prompts, records, strict=True)
    ]


def with_pass_rates(groups: Groups) -> list[Prompt]:
    """Return each prompt with the share of its completions that are correct.

    Prompts that are too long are not measured.
    """
    rate = lambda group: sum(each.correct for each in group) / len(group)
    return [
        g[0].prompt
        if g[0].record == TOO_LONG
        else dataclasses.replace(g[0].prompt, pass_rate=rate(g))
        for g in groups
    ]
