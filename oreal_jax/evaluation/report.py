"""How many problems of a set a model solves, and what its attempts look like.

Greedy pass@1, or over K samples avg@K, pass@k and maj@K, each with a 95% interval over
problems. A completion without its stop token is incorrect, as in training.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from oreal_jax.data import Chat, Prompt
from oreal_jax.evaluation.attempts import Attempt, Finished, draw, judge
from oreal_jax.evaluation.statistics import Measure, majority, mean, pass_at
from oreal_jax.model import Params
from oreal_jax.sampling import Engine, Sampling
from oreal_jax.verify import Pool
from oreal_jax.verify.extract import answer
from oreal_jax.verify.rule import canonical

Groups = Sequence[Sequence[Attempt]]  # the attempts at each problem


class Report(NamedTuple):
    """Measures in [0, 1] by name, the main one first, and every judged item.

    `truncated` is the share of completions without stop token; `tokens_correct` and
    `tokens_incorrect` are mean lengths, None where there are none. `breakdown` has the
    main measure and the number of problems for each value of a field.
    """

    measures: dict[str, Measure]
    problems: int
    samples: int
    undecided: int
    truncated: float
    tokens_correct: float | None
    tokens_incorrect: float | None
    breakdown: dict[str, dict[str, tuple[int, Measure]]]
    items: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """What the main measure is called."""
        return next(iter(self.measures))

    @property
    def accuracy(self) -> float:
        """The main measure."""
        return self.measures[self.name].value

    @property
    def low(self) -> float:
        """The lower end of its interval."""
        return self.measures[self.name].low

    @property
    def high(self) -> float:
        """The upper end of its interval."""
        return self.measures[self.name].high

    def as_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        main = {"accuracy": self.accuracy, "low": self.low, "high": self.high}
        measures = {name: m._asdict() for name, m in self.measures.items()}
        breakdown = {
            field: {
                value: {"problems": count, **measure._asdict()}
                for value, (count, measure) in values.items()
            }
            for field, values in self.breakdown.items()
        }
        own = {"measures": measures, "breakdown": breakdown}
        return main | self._asdict() | own

    def __str__(self) -> str:
        return (
            f"{self.name} {self.accuracy:.1%} (95% interval {self.low:.1%} to "
            f"{self.high:.1%}) on {self.problems} problems; {self.truncated:.1%} "
            f"without stop token, {self.undecided} undecided"
        )


def evaluate(
    engine: Engine,
    params: Params,
    sampling: Sampling,
    chat: Chat,
    prompts: Sequence[Prompt],
    pool: Pool,
    *,
    samples: int = 1,
    seed: int = 0,
    finished: Finished | None = None,
    on_progress: Callable[[int, int], None] = lambda tokens, finished: None,
) -> Report:
    """Completes and judges every prompt `samples` times.

    One sample is enough where the sampling is greedy.
    """
    drawn = draw(
        engine,
        engine.weights(params),
        sampling,
        chat,
        prompts,
        samples,
        seed=seed,
        finished={} if finished is None else finished,
        on_progress=on_progress,
    )
    attempts = judge(pool, prompts, drawn)
    return report([], attempts) if samples > 1 else report(attempts, [])


def report(
    greedy: Groups, sampled: Groups, by: Sequence[str] = (), seed: int = 0
) -> Report:
    """What greedy attempts (one a problem), sampled ones (K a problem) or both say.

    `by` are fields to break the main measure down by; `seed` is the bootstrap's.
    """
    measures = {}
    if greedy:
        measures["pass@1"] = mean(correct(greedy)[:, 0].astype(float), seed)
    if sampled:
        measures |= of_samples(sampled, seed)
    main = greedy or sampled
    attempts = list(itertools.chain.from_iterable([*greedy, *sampled]))
    lengths = lambda of: [a.drawn.tokens for a in attempts if a.correct == of]
    average = lambda numbers: float(np.mean(numbers)) if numbers else None
    return Report(
        measures=measures,
        problems=len(main),
        samples=len(main[0]),
        undecided=sum(a.verdict.outcome == "undecided" for a in attempts),
        truncated=float(np.mean([a.drawn.finish_reason == "length" for a in attempts])),
        tokens_correct=average(lengths(True)),
        tokens_incorrect=average(lengths(False)),
        breakdown={field: broken_down(main, field, seed) for field in by},
        items=[a.as_json() | {"greedy": True} for g in greedy for a in g]
        + [a.as_json() | {"greedy": False} for g in sampled for a in g],
    )


def of_samples(groups: Groups, seed: int) -> dict[str, Measure]:
    """avg@K, pass@k for k = 2, 4, ... K, and maj@K."""
    solved = correct(groups)
    samples = solved.shape[1]
    measures = {f"avg@{samples}": mean(solved.mean(axis=1), seed)}
    if samples == 1:
        return measures
    powers = itertools.takewhile(lambda k: k < samples, (2**i for i in range(1, 64)))
    for k in [*powers, samples]:
        measures[f"pass@{k}"] = mean(pass_at(k, solved), seed)
    won = [majority([vote(a) for a in g], [a.correct for a in g]) for g in groups]
    measures[f"maj@{samples}"] = mean(np.array(won), seed)
    return measures


def correct(groups: Groups) -> np.ndarray:
    """Which attempts are correct: [problems, samples]."""
    return np.array([[attempt.correct for attempt in group] for group in groups])


def vote(attempt: Attempt) -> str | None:
    """The answer that an attempt stands for; None where it has none."""
    if attempt.drawn.finish_reason != "stop":
        return None
    found, _ = answer(attempt.drawn.completion)
    return None if found is None else canonical(found)


def broken_down(
    groups: Groups, field: str, seed: int
) -> dict[str, tuple[int, Measure]]:
    """For each value of a field: how many problems have it, and their mean."""
    having: dict[str, list[float]] = {}
    for group in groups:
        share = float(np.mean([attempt.correct for attempt in group]))
        for value in group[0].prompt.values(field):
            having.setdefault(value, []).append(share)
    return {
        value: (len(shares), mean(np.array(shares), seed))
        for value, shares in sorted(having.items())
    }
