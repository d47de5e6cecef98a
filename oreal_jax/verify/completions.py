"""One path from completions to verdicts, for training, evaluation and data."""

from collections.abc import Callable, Sequence
from typing import Protocol

from oreal_jax.verify.llm_judge import Case, Judge
from oreal_jax.verify.pool import Pool
from oreal_jax.verify.verdict import Verdict


class Problem(Protocol):
    """A question with its gold answer."""

    @property
    def question(self) -> str:
        """The question."""
        ...

    @property
    def gold_answer(self) -> str:
        """The gold answer."""
        ...


class Completed(Protocol):
    """A text and how it ended: "stop" at a stop token, else "length"."""

    @property
    def text(self) -> str:
        """The text."""
        ...

    @property
    def finish_reason(self) -> str:
        """How it ended."""
        ...


def verify_completions(
    pool: Pool,
    completions: Sequence[tuple[Problem, Completed]],
    *,
    judge: Judge | None = None,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[Verdict]:
    """Return a verdict per completion, in order.

    A completion without its stop token is incorrect, whatever it says. The rule decides
    about the others, and the judge, where there is one, about those that the rule does
    not call correct. `on_done(n)` is called after n more verdicts of the rule.
    """
    verdicts = [Verdict.truncated()] * len(completions)
    stopped = [
        i for i, (_, each) in enumerate(completions) if each.finish_reason == "stop"
    ]
    on_done(len(completions) - len(stopped))
    pairs = [(completions[i][1].text, completions[i][0].gold_answer) for i in stopped]
    for i, verdict in zip(stopped, pool.verdicts(pairs, on_done), strict=True):
        verdicts[i] = verdict
    if not judge:
        return verdicts
    return judge.verdicts(
        [
            Case(problem.question, problem.gold_answer, completion.text, verdict)
            for (problem, completion), verdict in zip(
                completions, verdicts, strict=True
            )
        ]
    )
