"""Verification of many completions: by rule, then by an LLM judge if there is one."""

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

    A candidate without stop token is incorrect unread. The pool applies the rule to the
    others, and `judge` decides those with an answer that the rule does not call
    correct. `on_progress(n)` reports n more candidates judged by rule.
    """
    verdicts = [Verdict.truncated()] * len(candidates)
    stopped = [i for i, c in enumerate(candidates) if c.finish_reason == "stop"]
    on_progress(len(candidates) - len(stopped))
    pairs = [(candidates[i].text, candidates[i].gold_answer) for i in stopped]
    for i, verdict in zip(stopped, pool.verdicts(pairs, on_progress), strict=True):
        verdicts[i] = verdict
    return judge.verdicts(candidates, verdicts) if judge else verdicts
