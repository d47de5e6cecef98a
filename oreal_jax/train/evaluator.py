"""Evaluation during training: every N steps; the best policy is saved.

    RUN/evaluations.jsonl    one object per evaluation, its step = finished steps
    RUN/evaluations/         the verified completions of each, for `oreal compare`
    RUN/best/                the best policy so far, a model directory of its own

The policy is evaluated before a step, so the first evaluation is of the initial model.
A resumed run does not repeat evaluations.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oreal_jax import distributed, metrics
from oreal_jax.checkpoints import run as checkpoints
from oreal_jax.config import TrainConfig, as_json
from oreal_jax.console import Screen
from oreal_jax.data import Chat, Prompt
from oreal_jax.distributed import defer_interrupts
from oreal_jax.errors import InputError
from oreal_jax.evaluation import (
    Evaluator,
    ProblemSet,
    VerifiedCompletion,
    load_sets,
    report,
)
from oreal_jax.evaluation.completions import CompletionRecord
from oreal_jax.evaluation.report import items
from oreal_jax.files import write_lines
from oreal_jax.model import Params
from oreal_jax.sampling import Engine, Sampling
from oreal_jax.train_state import TrainState
from oreal_jax.verify import Pool, Verdict
from oreal_jax.verify.llm_judge import Judge

Groups = Sequence[Sequence[VerifiedCompletion]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyEvaluator:
    """Evaluates the policy of a run at the steps that its config names.

    `engine` is that of training. One sample per problem is greedy, several are sampled
    as in training; answers are verified as in training.
    """

    config: TrainConfig
    run: Path
    screen: Screen
    chat: Chat
    engine: Engine
    sets: Sequence[ProblemSet]

    @property
    def sampling(self) -> Sampling:
        """How completions are sampled."""
        if self.config.evaluation.samples > 1:
            return self.config.sampling
        return dataclasses.replace(self.config.sampling, temperature=0.0)

    def is_due(self, step: int) -> bool:
        """Whether the policy after `step` finished steps is evaluated."""
        regular = step % self.config.evaluation.every == 0
        return bool(self.sets) and (regular or step == self.config.steps)

    def __call__(self, state: TrainState, pool: Pool, judge: Judge | None) -> float:
        """Evaluate the policy if that is due and not done; return the seconds spent."""
        start = time.perf_counter()
        step, path = int(state.step), self.run / "evaluations.jsonl"
        if not self.is_due(step):
            return 0.0
        rows = metrics.read(path, step=int, score=int | float)
        with defer_interrupts():
            best = checkpoints.newest_step(self.run / "best")
            # As process 0 reads them.
            rows, best = distributed.gather_values([rows, best])[0]
            existing = next((row for row in rows if row["step"] == step), None)
            if existing:
                # A later policy had replaced it.
                if existing.get("best") and best is None:
                    save_best(self.run, step, state.policy.params)
                return 0.0
            weights = self.engine.weights(state.policy.params)
        shares = [
            ProblemSet(name, list(distributed.take_share(problems)))
            for name, problems in self.sets
        ]
        samples = self.config.evaluation.samples
        completions = Evaluator(
            engine=self.engine,
            weights=weights,
            chat=self.chat,
            pool=pool,
            judge=judge,
            screen=self.screen,
            seed=self.config.seed,
        ).complete(
            shares, self.sampling, samples, "greedy" if samples == 1 else "sampled"
        )
        if judge:
            judge.take_counts()  # not those of the step
        with defer_interrupts():
            self._record(state, rows, best, path, completions)
        return time.perf_counter() - start

    def _record(
        self,
        state: TrainState,
        rows: list[dict],
        best: int | None,
        path: Path,
        completions: Mapping[str, Groups],
    ) -> None:
        """Record an evaluation, with the completions of all processes.

        `rows` are those of earlier evaluations. The policy is saved if it is better
        than that of step `best`.
        """
        reports = {}
        for name, problems in self.sets:
            groups = gather_completions(problems, completions[name])
            is_greedy = self.config.evaluation.samples == 1
            greedy, sampled = (groups, []) if is_greedy else ([], groups)
            reports[name] = report(greedy, sampled, seed=self.config.seed)
        step = int(state.step)
        values = {
            f"val-core/{name}/{report.name}": report.accuracy
            for name, report in reports.items()
        }
        score = float(np.mean(list(values.values())))
        is_best = all(score > row["score"] for row in rows if row["step"] == best)
        if is_best:
            save_best(self.run, step, state.policy.params)
        higher = [row for row in rows if row["score"] > score]
        rows.append({"step": step, "score": score, "best": is_best} | values)
        if distributed.is_first():
            file = self.run / "evaluations" / f"step_{step:06d}.jsonl"
            write_lines(file, items(reports, self._settings(step)))
            write_lines(path, rows)
        text = ", ".join(f"{name} {report}" for name, report in reports.items())
        directory = self.run / "best"
        if is_best and higher:
            top = max(higher, key=lambda row: row["score"])
            text += (
                f"; kept in {directory}, though its score {score:.4g} is "
                f"below {top['score']:.4g} after {top['step']} step(s), whose policy "
                "is no longer stored"
            )
        elif is_best:
            text += f"; the best so far, kept in {directory}"
        self.screen.log(f"after {step} step(s): {text}")

    def _settings(self, step: int) -> dict[str, Any]:
        """Return the settings of items, as `oreal eval` records them."""
        return dataclasses.asdict(self.sampling) | {
            "model": str(self.run),
            "step": step,
            "system_prompt": self.chat.system_prompt,
            "seed": self.config.seed,
            "k": self.config.evaluation.samples,
            "judge_model": self.config.verification.judge_model,
            "verifiers": as_json(self.config.verification.verifiers),
        }


def gather_completions(problems: Sequence[Prompt], groups: Groups) -> Groups:
    """Return the completions of all processes for each of `problems`.

    `groups` are those of this process's share.
    """
    rows = [
        [(c.sample, c.record, dataclasses.astuple(c.verdict)) for c in group]
        for group in groups
    ]
    gathered = distributed.gather_shares(
        rows, lambda rows: json.dumps(rows).encode(), json.loads
    )
    return [
        [
            VerifiedCompletion(
                problem, sample, CompletionRecord(*record), Verdict(*verdict)
            )
            for sample, record, verdict in group
        ]
        for problem, group in zip(problems, gathered, strict=True)
    ]


def save_best(run: Path, step: int, policy: Params) -> None:
    """Save the policy as RUN/best in place of the previous one."""
    best = run / "best"
    new, old = (run / f".best.{suffix}" for suffix in ("incomplete", "old"))
    if distributed.is_first():
        for path in (new, old):  # left by a kill
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(run / "model", new / "model")
        shutil.copy2(run / "config.json", new / "config.json")
    distributed.barrier(f"{new} was made")
    checkpoints.save_params(new / "checkpoints" / str(step) / "policy", policy)
    if distributed.is_first():
        if best.exists():
            best.rename(old)
        new.rename(best)
        shutil.rmtree(old, ignore_errors=True)


def load_evaluation_sets(
    config: TrainConfig, chat: Chat, prompts: Sequence[Prompt], engine: Engine
) -> list[ProblemSet]:
    """Load the sets of `config.evaluation`; `prompts` are trained on.

    Raises:
        InputError: a set cannot be used, or a problem is trained on or too long.
    """
    evaluation = config.evaluation
    sets = load_sets(evaluation.data, Path(evaluation.folder), "evaluation.data")
    trained_on = {prompt.question for prompt in prompts}
    for name, problems in sets:
        for problem in problems:
            where = f"evaluation.data: problem {problem.id!r} of {name}"
            if problem.question in trained_on:
                raise InputError(f"{where} is trained on")
            length = len(chat.encode(problem.question))
            try:
                engine.check_length(length, config.sampling.max_tokens)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
    return sets
