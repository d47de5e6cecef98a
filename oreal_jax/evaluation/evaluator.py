"""Evaluation of a model on sets of problems, greedily, by samples, or both."""

import dataclasses
from collections.abc import Sequence

from oreal_jax.console import Screen
from oreal_jax.data import Chat
from oreal_jax.errors import InputError
from oreal_jax.evaluation.completions import VerifiedCompletion, verify
from oreal_jax.evaluation.generation import Records, generate
from oreal_jax.evaluation.report import Report, report
from oreal_jax.evaluation.sets import ProblemSet
from oreal_jax.model.decoding import Weights
from oreal_jax.sampling import Engine, Sampling
from oreal_jax.verify import Pool
from oreal_jax.verify.llm_judge import Judge


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator:
    """A model that completes problems, and the verifiers of its completions.

    `weights` are the engine's. `records` are of completions that are finished already;
    new ones are added.
    """

    engine: Engine
    weights: Weights
    chat: Chat
    pool: Pool
    judge: Judge | None = None
    screen: Screen
    seed: int = 0
    records: Records = dataclasses.field(default_factory=dict)

    def complete(
        self, sets: Sequence[ProblemSet], sampling: Sampling, samples: int, kind: str
    ) -> dict[str, list[list[VerifiedCompletion]]]:
        """Generate and verify `samples` completions of each problem, by set.

        `kind` ("greedy" or "sampled") names them on the screen and in `records`.

        Raises:
            InputError: every problem of a set with its completion exceeds the model.
        """
        groups = {}
        for name, problems in sets:
            total, part = samples * len(problems), f"{name}, {kind}"
            phase = ("testing", total, f"{part}: ")
            with self.screen.phase(*phase) as advance:
                records = generate(
                    self.engine,
                    self.weights,
                    sampling,
                    self.chat,
                    problems,
                    samples,
                    seed=self.seed,
                    records=self.records,
                    part=part,
                    on_progress=lambda tokens, n, advance=advance: advance(n, tokens),
                    log=self.screen.log,
                )
            with self.screen.phase(*phase) as advance:
                groups[name] = verify(self.pool, problems, records, advance, self.judge)
        return groups

    def reports(
        self,
        sets: Sequence[ProblemSet],
        greedy: Sampling | None,
        sampled: Sampling | None,
        samples: int,
        by: Sequence[str] = (),
    ) -> dict[str, Report]:
        """Return a report for each set, by name.

        Each problem is completed once by `greedy`, `samples` times by `sampled`, if
        they are given; `by` are fields to break the main measure down by.

        Raises:
            InputError: every problem of a set with its completion exceeds the model.
        """
        once = self.complete(sets, greedy, 1, "greedy") if greedy else {}
        often = self.complete(sets, sampled, samples, "sampled") if sampled else {}
        return {
            name: report(once.get(name, []), often.get(name, []), by, self.seed)
            for name, _ in sets
        }


def check_fields(sets: Sequence[ProblemSet], by: Sequence[str]) -> None:
    """Raise InputError if a field to break the main measure down by is in no set."""
    problems = [prompt for each in sets for prompt in each.problems]
    known = sorted({field for prompt in problems for field in prompt.labels})
    for field in by:
        if field not in known:
            names = ", ".join(each.name for each in sets)
            raise InputError(
                f"--by {field}: no row of {names} has that field; their fields are "
                f"{', '.join(known) or 'only the usual ones'}"
            )
