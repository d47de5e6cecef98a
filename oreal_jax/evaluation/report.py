"""Measures of a model on one set of problems.

Greedy pass@1, or over K samples avg@K, pass@k and maj@K, each with a 95% interval over
problems. A completion without its stop token is incorrect, as in training.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from oreal_jax.evaluation.completions import TOO_LONG, Groups, VerifiedCompletion
from oreal_jax.evaluation.statistics import Measure, majority, mean, pass_at
from oreal_jax.verify.extract import answer
from oreal_jax.verify.rule import canonical


class Report(NamedTuple):
    """Measures in [0, 1] by name, the main one first, and all verified completions.

    truncated: the share of completions without stop token.
    tokens_correct, tokens_incorrect: mean lengths, None without such completions.
    breakdown: number of problems and main measure for each value of a field.
    too_long: number of problems without space for a completion; they are incorrect.
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
    too_long: int = 0

    @property
    def name(self) -> str:
        """The name of the main measure."""
        return next(iter(self.measures))

    @property
    def main(self) -> Measure:
        """The main measure."""
        return self.measures[self.name]

    @property
    def accuracy(self) -> float:
        """The value of the main measure."""
        return self.main.value

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        breakdown = {
            field: {
                value: {"problems": count, **measure._asdict()}
                for value, (count, measure) in values.items()
            }
            for field, values in self.breakdown.items()
        }
        measures = {name: m._asdict() for name, m in self.measures.items()}
        main = {"accuracy": self.accuracy, "low": self.main.low, "high": self.main.high}
        own = self._asdict() | {"measures": measures, "breakdown": breakdown}
        if not self.too_long:
            del own["too_long"]
        return main | own

    def __str__(self) -> str:
        count = f"{self.too_long} problem{'s' * (self.too_long > 1)} too long"
        return (
            f"{self.name} {self.accuracy:.1%} (95% interval {self.main.low:.1%} to "
            f"{self.main.high:.1%}) on {self.problems} problems; {self.truncated:.1%} "
            f"without stop token, {self.undecided} undecided"
            + (f", {count}" if self.too_long else "")
        )


def report(
    greedy: Groups, sampled: Groups, by: Sequence[str] = (), seed: int = 0
) -> Report:
    """Report on greedy completions (one per problem), sampled ones (K), or both.

    `by` are fields to break the main measure down by; `seed` is the bootstrap's.
    """
    measures = {}
    if greedy:
        measures["pass@1"] = mean(correct(greedy)[:, 0].astype(float), seed)
    if sampled:
        measures |= sample_measures(sampled, seed)
    main = greedy or sampled
    completions = list(itertools.chain.from_iterable([*greedy, *sampled]))
    lengths = lambda outcome: [
        each.record.tokens
        for each in completions
        if each.correct == outcome and each.record != TOO_LONG
    ]
    average = lambda numbers: float(np.mean(numbers)) if numbers else None
    truncated = [each.record.finish_reason == "length" for each in completions]
    return Report(
        measures=measures,
        problems=len(main),
        samples=len(main[0]),
        undecided=sum(each.verdict.outcome == "undecided" for each in completions),
        truncated=float(np.mean(truncated)),
        tokens_correct=average(lengths(True)),
        tokens_incorrect=average(lengths(False)),
        breakdown={field: break_down(main, field, seed) for field in by},
        items=[
            each.as_json() | {"greedy": is_greedy}
            for is_greedy, groups in ((True, greedy), (False, sampled))
            for group in groups
            for each in group
        ],
        too_long=sum(group[0].record == TOO_LONG for group in main),
    )


def sample_measures(groups: Groups, seed: int) -> dict[str, Measure]:
    """Compute avg@K, pass@k for k = 2, 4, ... K, and maj@K."""
    solved = correct(groups)
    samples = solved.shape[1]
    measures = {f"avg@{samples}": mean(solved.mean(axis=1), seed)}
    if samples == 1:
        return measures
    powers = itertools.takewhile(lambda k: k < samples, (2**i for i in range(1, 64)))
    for k in [*powers, samples]:
        measures[f"pass@{k}"] = mean(pass_at(k, solved), seed)
    majorities = [
        majority([vote(each) for each in group], [each.correct for each in group])
        for group in groups
    ]
    measures[f"maj@{samples}"] = mean(np.array(majorities), seed)
    return measures


def correct(groups: Groups) -> np.ndarray:
    """Return which completions are correct: [problems, samples]."""
    return np.array([[each.correct for each in group] for group in groups])


def vote(completion: VerifiedCompletion) -> str | None:
    """Return the answer of a completion in one spelling; None if it has none."""
    if completion.record.finish_reason != "stop":
        return None
    text = answer(completion.record.completion)
    return canonical(text) if isinstance(text, str) else None


def break_down(groups: Groups, field: str, seed: int) -> dict[str, tuple[int, Measure]]:
    """Return the number of problems and their mean for each value of a field."""
    shares: dict[str, list[float]] = {}
    for group, share in zip(groups, correct(groups).mean(axis=1), strict=True):
        for value in group[0].prompt.values(field):
            shares.setdefault(value, []).append(float(share))
    return {
        value: (len(shares[value]), mean(np.array(shares[value]), seed))
        for value in sorted(shares)
    }


def items(
    reports: Mapping[str, Report], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return all verified completions of all sets, with the settings of each."""
    return [
        {"set": name} | item | {"settings": settings}
        for name, report in reports.items()
        for item in report.items
    ]


def as_json(
    model: str, reports: Mapping[str, Report], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all reports as JSON values; that of a single set also at the top level."""
    single = next(iter(reports.values())).as_json() if len(reports) == 1 else {}
    sets = {name: r.as_json() for name, r in reports.items()}
    for values in sets.values():
        del values["items"]
    return {"model": model} | single | {"sets": sets, "items": items(reports, settings)}
