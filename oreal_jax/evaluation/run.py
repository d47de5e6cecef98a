"""A model measured on several sets, greedily, by samples, or both."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from oreal_jax.console import Screen
from oreal_jax.data import Chat
from oreal_jax.errors import InputError
from oreal_jax.evaluation import tables
from oreal_jax.evaluation.attempts import Attempt, Finished, draw, judge
from oreal_jax.evaluation.report import Report, report
from oreal_jax.evaluation.sets import ProblemSet
from oreal_jax.model import Params
from oreal_jax.model.decoding import Weights
from oreal_jax.sampling import Engine, Sampling
from oreal_jax.verify import Pool
from oreal_jax.verify.llm_judge import Judge


class Plan(NamedTuple):
    """How each problem is attempted: once by `greedy`, `samples` times by `sampled`."""

    greedy: Sampling | None
    sampled: Sampling | None
    samples: int


def check_fields(sets: Sequence[ProblemSet], by: Sequence[str]) -> None:
    """Raises InputError where no set has a field that is to be broken down by."""
    problems = [prompt for each in sets for prompt in each.problems]
    known = sorted({field for prompt in problems for field in prompt.labels})
    for field in by:
        if field not in known:
            names = ", ".join(each.name for each in sets)
            raise InputError(
                f"--by {field}: no row of {names} has that field; their fields are "
                f"{', '.join(known) or 'only the usual ones'}"
            )


def measure(
    plan: Plan,
    engine: Engine,
    params: Params,
    chat: Chat,
    pool: Pool,
    sets: Sequence[ProblemSet],
    *,
    by: Sequence[str] = (),
    seed: int = 0,
    finished: Finished | None = None,
    second: Judge | None = None,
    screen: Screen,
) -> dict[str, Report]:
    """A report for each set, by name; `second` judges after the pool's rule.

    Raises:
        InputError: a problem and its completion exceed the model.
    """
    finished = {} if finished is None else finished
    weights = engine.weights(params)

    def attempts(sampling: Sampling | None, samples: int, kind: str):
        if sampling is None:
            return {each.name: [] for each in sets}
        return attempt(
            engine,
            weights,
            sampling,
            samples,
            kind,
            chat,
            pool,
            sets,
            seed=seed,
            finished=finished,
            second=second,
            screen=screen,
        )

    greedy = attempts(plan.greedy, 1, "greedy")
    sampled = attempts(plan.sampled, plan.samples, "sampled")
    return {name: report(greedy[name], sampled[name], by, seed) for name in greedy}


def attempt(
    engine: Engine,
    weights: Weights,
    sampling: Sampling,
    samples: int,
    kind: str,
    chat: Chat,
    pool: Pool,
    sets: Sequence[ProblemSet],
    *,
    seed: int,
    finished: Finished,
    second: Judge | None = None,
    screen: Screen,
) -> dict[str, list[list[Attempt]]]:
    """The attempts at the problems of each set, by its name; `kind` says what they are
    for people and in `finished`.

    Raises:
        InputError: a problem and its completion exceed the model.
    """
    found = {}
    for name, problems in sets:
        total, label = samples * len(problems), f"{name}, {kind}: "
        with screen.phase("testing", total=total, label=label) as advance:
            drawn = draw(
                engine,
                weights,
                sampling,
                chat,
                problems,
                samples,
                seed=seed,
                finished=finished,
                part=f"{name}, {kind}",
                on_progress=lambda tokens, finished, advance=advance: advance(
                    finished, tokens
                ),
            )
        with screen.phase("testing", total=total, label=label) as advance:
            found[name] = judge(pool, problems, drawn, advance, second)
    return found


def items(reports: Mapping[str, Report]) -> list[dict[str, Any]]:
    """Every judged item of every set."""
    return [{"set": name} | item for name, r in reports.items() for item in r.items]


def as_json(model: str, reports: Mapping[str, Report]) -> dict[str, Any]:
    """All of it as plain JSON values; the measures of a single set at the top, too."""
    alone = next(iter(reports.values())).as_json() if len(reports) == 1 else {}
    sets = {name: r.as_json() for name, r in reports.items()}
    for values in sets.values():
        del values["items"]
    return {"model": model} | alone | {"sets": sets, "items": items(reports)}


def show(model: str, reports: Mapping[str, Report]) -> None:
    """Prints a line for each set, then the tables."""
    tables.say(*(f"{name}: {report}" for name, report in reports.items()))
    tables.say(tables.measured(reports))
    for name, each in reports.items():
        for field, values in each.breakdown.items():
            if values:
                tables.say(tables.broken_down(name, each, field))
    beside = tables.beside_the_paper(model, reports)
    if beside:
        tables.say(beside)
