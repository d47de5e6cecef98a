"""Evaluation inside training: every N steps, and the best policy kept.

    RUN/evaluations.jsonl    one object an evaluation, its step = training steps done
    RUN/best/                the best policy so far, a model directory of its own

An evaluation is of the policy as a step finds it, so the first is of the initial model.
What a stopped run has measured is not measured again.
"""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from oreal_jax import distributed, metrics
from oreal_jax.checkpoints import run as checkpoints
from oreal_jax.config import Evaluation, TrainConfig
from oreal_jax.data import Chat, Prompt
from oreal_jax.distributed import uninterrupted
from oreal_jax.errors import InputError
from oreal_jax.evaluation import (
    Evaluator,
    ProblemSet,
    VerifiedCompletion,
    load_sets,
    report,
)
from oreal_jax.files import write_lines
from oreal_jax.sampling import Engine, Sampling
from oreal_jax.train import exchange
from oreal_jax.train.session import Session
from oreal_jax.verify import Pool
from oreal_jax.verify.llm_judge import Judge


class Examination:
    """Evaluates the policy of a session where its config says so."""

    def __init__(
        self,
        config: Evaluation,
        sets: Sequence[ProblemSet],
        engine: Engine,
        sampling: Sampling,
    ):
        """`engine` is that of training; `sampling` is greedy for one sample per
        problem, else that of training."""
        self.config, self.sets = config, sets
        self.engine, self.sampling = engine, sampling
        self.kind = "greedy" if config.samples == 1 else "sampled"

    def due(self, step: int, steps: int) -> bool:
        """Whether the policy after `step` of `steps` training steps is evaluated."""
        return bool(self.sets) and (step % self.config.every == 0 or step == steps)

    def take(self, session: Session, pool: Pool, judge: Judge | None = None) -> None:
        """Evaluates the policy as it is, if that is due and not done; answers are
        judged as in training."""
        step, path = session.step, session.run / "evaluations.jsonl"
        if not self.due(step, session.steps):
            return
        rows = metrics.read(path) if path.exists() else []
        with uninterrupted():
            best = checkpoints.newest_step(session.run / "best")
            # As process 0 sees them.
            rows, best = distributed.gather_values([rows, best])[0]
            done = next((row for row in rows if row["step"] == step), None)
            if done:
                if done["best"] and best is None:  # a later one took its place
                    keep(session, step)
                return
            weights = self.engine.weights(session.state.policy.params)
        with session.aside():
            mine = [
                ProblemSet(name, list(distributed.share(problems)))
                for name, problems in self.sets
            ]
            tried = Evaluator(
                engine=self.engine,
                weights=weights,
                chat=session.chat,
                pool=pool,
                judge=judge,
                screen=session.screen,
                seed=session.config.seed,
            ).complete(mine, self.sampling, self.config.samples, self.kind)
            if judge:  # what it did here is not the step's
                judge.take_counts()
        with uninterrupted():
            self._record(session, rows, best, path, tried)

    def _record(
        self,
        session: Session,
        rows: list[dict],
        kept: int | None,
        path: Path,
        tried: Mapping[str, list[list[VerifiedCompletion]]],
    ) -> None:
        """Adds what all processes have measured to the `rows` of earlier evaluations,
        and keeps the policy if it is better than that of step `kept`."""
        reports = {}
        for name, problems in self.sets:
            found = exchange.all_attempts(problems, tried[name])
            both = (found, []) if self.kind == "greedy" else ([], found)
            reports[name] = report(*both, seed=session.config.seed)
        step = session.step
        values = {
            f"val-core/{name}/{report.name}": report.accuracy
            for name, report in reports.items()
        }
        score = float(np.mean(list(values.values())))
        best = all(score > row["score"] for row in rows if row["step"] == kept)
        if best:
            keep(session, step)
        higher = [row for row in rows if row["score"] > score]
        rows.append({"step": step, "score": score, "best": best} | values)
        if distributed.is_first():
            write_lines(path, rows)
        said = ", ".join(f"{name} {report}" for name, report in reports.items())
        mark = f"; the best so far, kept in {session.run / 'best'}" if best else ""
        if best and higher:
            top = max(higher, key=lambda row: row["score"])
            mark = (
                f"; kept in {session.run / 'best'}, though its score {score:.4g} is "
                f"below {top['score']:.4g} after step {top['step']}, whose policy is "
                "no longer there"
            )
        session.screen.say(f"after step {step}: {said}{mark}")


def keep(session: Session, step: int) -> None:
    """Writes the policy as RUN/best, in place of the one that was there."""
    best = session.run / "best"
    new, old = (session.run / f".best.{word}" for word in ("incomplete", "old"))
    if distributed.is_first():
        for left in (new, old):  # by a kill
            shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(session.run / "model", new / "model")
        shutil.copy2(session.run / "config.json", new / "config.json")
    distributed.barrier(f"{new} was made")
    directory = new / "checkpoints" / str(step) / "policy"
    checkpoints.save_params(directory, session.state.policy.params)
    if distributed.is_first():
        if best.exists():
            best.rename(old)
        new.rename(best)
        shutil.rmtree(old, ignore_errors=True)


def examination_of(
    config: TrainConfig,
    chat: Chat,
    prompts: Sequence[Prompt],
    engine: Engine,
) -> Examination:
    """The checked evaluation of a config. `prompts` are trained on, `engine` is the one
    that training samples with.

    Raises:
        InputError: a set is unusable, or a problem of it is trained on or too long.
    """
    wanted = config.evaluation
    sets = load_sets(wanted.data, Path(wanted.folder), "evaluation.data")
    trained_on = {prompt.question for prompt in prompts}
    room = engine.config.max_length - config.sampling.max_tokens
    for name, problems in sets:
        for problem in problems:
            where = f"evaluation.data: problem {problem.id!r} of {name}"
            if problem.question in trained_on:
                raise InputError(f"{where} is trained on")
            if (length := len(chat.encode(problem.question))) > room:
                raise InputError(
                    f"{where} has {length} tokens, there is room for {room}"
                )
    sampling = config.sampling
    if wanted.samples == 1:
        sampling = dataclasses.replace(sampling, temperature=0.0)
    return Examination(wanted, sets, engine, sampling)
