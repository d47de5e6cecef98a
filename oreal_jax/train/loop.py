"""The OREAL loop, in the order of the paper's algorithm.

    for each step:
        generate K completions of each prompt with the current policy
        verify them: correct, incorrect or undecided
        compute advantages over all K; select one correct and one incorrect
        add the reference model's log-probabilities
        update the token reward model and the policy

Everything random is a function of (seed, step), and a checkpoint records how many
prompts were used, so a resumed run matches an uninterrupted one. With several
processes, each generates and verifies its share of the prompts; the completions are
then gathered, and all processes run the update together, as one program.
"""

import functools
from pathlib import Path

import jax

from oreal_jax import distributed, sharding
from oreal_jax.config import TrainConfig
from oreal_jax.console import Screen
from oreal_jax.data import build
from oreal_jax.data.packing import pack
from oreal_jax.distributed import defer_interrupts
from oreal_jax.train import metrics as step_metrics
from oreal_jax.train.lock import locked
from oreal_jax.train.programs import make_run_step
from oreal_jax.train.rollouts import Rollouts, all_trajectories, step_prompts
from oreal_jax.train.run_directory import RunDirectory
from oreal_jax.train.scoring import make_reference_scorer, put_batch
from oreal_jax.train.setup import open_judge, set_up
from oreal_jax.trajectory import (
    merge,
    select,
    token_count,
    trajectory_metrics,
    with_advantages,
)
from oreal_jax.verify import Pool


def train_oreal(
    config: TrainConfig, run: str | Path, screen: Screen | None = None, profile: int = 0
) -> None:
    """Train, or resume training, in the run directory `run`.

    `profile` steps are traced into RUN/profile.

    Raises:
        InputError: the config, model, prompts or run directory cannot be used.
    """
    with locked(Path(run)):
        _train(config, Path(run), screen or Screen(), profile)


def _train(config: TrainConfig, run: Path, screen: Screen, profile: int) -> None:
    setup = set_up(config, run, screen)
    model, mesh, chat = setup.model, setup.model.mesh, setup.model.chat
    judging, verification = open_judge(config, screen), config.verification
    directory = RunDirectory(
        config, run, screen, model, setup.data, steps=config.steps, profile=profile
    )
    if distributed.is_first() and not (run / "data").is_dir():
        build(setup.prompts, run / "data")
    pool = Pool(verification.workers, verification.deadline, verification.verifiers)
    with directory, pool, judging as judge:
        with distributed.enter_together():
            reference = directory.load_reference()
        add_reference = make_reference_scorer(model.config, mesh, model.dtype)
        real_tokens = setup.engine.real_tokens
        train_step = make_run_step(config, directory.models, mesh, real_tokens)
        rollouts = Rollouts(config, run, screen, chat, setup.engine, pool, judge)
        make_batch = functools.partial(
            pack,
            rows=config.packing.rows * sharding.count_row_shards(mesh),
            row_length=config.packing.row_length,
            limits=setup.limits,
        )
        undecided = verification.undecided
        state = directory.state
        while (step := int(state.step)) < config.steps:
            evaluation_seconds = setup.evaluator(state, pool, judge)
            label, frozen = f"step {step}: ", step < config.freeze_steps
            prompts = step_prompts(config, chat, setup.order, directory.data_position)
            share = distributed.take_share(prompts)
            verified = rollouts(state.policy.params, share, step)
            with defer_interrupts():
                groups = all_trajectories(prompts, verified)
                groups = with_advantages(groups, config.loss.advantage, undecided)
                selected = select(groups, config.keep, config.seed, step, undecided)
                metrics = trajectory_metrics(groups, selected, verification.verifiers)
                metrics |= rollouts.metrics()
                if selected:
                    batch, indices = make_batch([t.example() for t in selected])
                    batch = put_batch(batch, mesh)
                    with screen.phase("ref", label=label):
                        batch = jax.block_until_ready(add_reference(reference, batch))
                    with screen.phase("update_actor", label=label):
                        state, measured, token_scores = train_step(state, batch)
                        directory.record_state(state)
                        metrics |= step_metrics.check_finite(measured, step)
                    selected = step_metrics.with_scores(
                        selected, indices, batch, token_scores
                    )
                    metrics |= step_metrics.check_agreement(selected, config, step)
                    del batch, measured, token_scores  # frees memory of the devices
                else:
                    state = state._replace(step=state.step + 1)
                    directory.record_state(state)
                with screen.phase("write", label=label):
                    groups = merge(groups, selected)
                    directory.write_trajectories(step, groups, chat.pieces)
                directory.finish_step(
                    metrics,
                    step_metrics.screen_line(step, config.steps, metrics),
                    step_metrics.phase_totals(
                        directory.models, groups, selected, frozen
                    ),
                    tokens=token_count(groups),
                    excluded_seconds=evaluation_seconds,
                )
        setup.evaluator(state, pool, judge)
