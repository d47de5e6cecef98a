"""A model measured on several sets, greedily, by samples, or both."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from oreal_jax.console import Screen
from oreal_jax.data import Chat
from oreal_jax.errors import BadInput
from oreal_jax.evaluation import tables
from oreal_jax.evaluation.attempts import Attempt, Finished, draw, judge
from oreal_jax.evaluation.report import Report, report
from oreal_jax.evaluation.sets import ProblemSet
from oreal_jax.model import Params
from oreal_jax.sampling import Engine
from oreal_jax.verify import Pool


class Plan(NamedTuple):
    """How each problem is attempted: once by `greedy`, `samples` times by `sampled`."""

    greedy: Engine | None
    sampled: Engine | None
    samples: int


def check_fields(sets: Sequence[ProblemSet], by: Sequence[str]) -> None:
    """Raises BadInput where no set has a field that is to be broken down by."""
    problems = [prompt for each in sets for prompt in each.problems]
    known = sorted({field for prompt in problems for field in prompt.labels})
    for field in by:
        if field not in known:
            names = ", ".join(each.name for each in sets)
            raise BadInput(
                f"--by {field}: no row of {names} has that field; their fields are "
                f"{', '.join(known) or 'only the usual ones'}"
            )


class Tried(NamedTuple):
    """The attempts at each problem of a set, by both ways; empty without that way."""

    greedy: list[list[Attempt]]
    sampled: list[list[Attempt]]


def measure(
    plan: Plan,
    params: Params,
    chat: Chat,
    pool: Pool,
    sets: Sequence[ProblemSet],
    *,
    by: Sequence[str] = (),
    seed: int = 0,
    finished: Finished | None = None,
    screen: Screen,
) -> dict[str, Report]:
    """A report for each set, by name.

    Raises:
        BadInput: a problem and its completion exceed the model.
    """
    tried = attempt(
        plan, params, chat, pool, sets, seed=seed, finished=finished, screen=screen
    )
    return {name: report(*of, by, seed) for name, of in tried.items()}


def attempt(
    plan: Plan,
    params: Params,
    chat: Chat,
    pool: Pool,
    sets: Sequence[ProblemSet],
    *,
    seed: int = 0,
    finished: Finished | None = None,
    screen: Screen,
) -> dict[str, Tried]:
    """The attempts at the problems of each set, by its name.

    Raises:
        BadInput: a problem and its completion exceed the model.
    """
    finished = {} if finished is None else finished

    def attempts(
        engine: Engine | None, count: int, of: ProblemSet, kind: str
    ) -> list[list[Attempt]]:
        if engine is None:
            return []
        total = count * len(of.problems)
        label = f"{of.name}, {kind}: "
        with screen.phase("testing", total=total, label=label) as advance:
            drawn = draw(
                engine,
                params,
                chat,
                of.problems,
                count,
                seed=seed,
                finished=finished,
                part=f"{of.name}, {kind}",
                on_progress=lambda tokens, finished: advance(finished, tokens),
            )
        with screen.phase("testing", total=total, label=label) as advance:
            return judge(pool, of.problems, drawn, advance)

    return {
        each.name: Tried(
            attempts(plan.greedy, 1, each, "greedy"),
            attempts(plan.sampled, plan.samples, each, "sampled"),
        )
        for each in sets
    }


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
