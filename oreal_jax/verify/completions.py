"""Verification of many completions: in a pool, then by an LLM judge if any."""

from collections.abc import Callable, Sequence

from oreal_jax.verify.llm_judge import Judge
from oreal_jax.verify.pool import Pool
from oreal_jax.verify.verdict import Candidate, Verdict


def verify_completions(
    candidates: Sequence[Candidate],
    pool: Pool,
    judge: Judge | None = None,
    on_progress: Callable[[int], None] = lambda count: None,
) -> list[Verdict]:
    """Return a verdict for each candidate, in order.

    A candidate without stop token is incorrect unread. The pool judges the others, and
    `judge` those with an answer that the pool does not call correct.
    `on_progress(n)` reports n more candidates that the pool has judged.
    """
    verdicts = [Verdict.truncated()] * len(candidates)
    stopped = [i for i, c in enumerate(candidates) if c.finish_reason == "stop"]
    on_progress(len(candidates) - len(stopped))
    chosen = [candidates[i] for i in stopped]
    pairs = [(c.text, c.gold_answer, c.prompt) for c in chosen]
    for i, verdict in zip(stopped, pool.verdicts(pairs, on_progress), strict=True):
        verdicts[i] = verdict
    return judge.verdicts(candidates, verdicts) if judge else verdicts
