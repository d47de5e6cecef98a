"""Supervised fine-tuning on solutions: the RL loop's train step without the rollout.

With solutions that a model found itself and a verifier judged correct, this is RFT, the
start that OREAL trains from.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from oreal_jax import distributed, efficiency, losses, sharding
from oreal_jax.config import SftConfig
from oreal_jax.console import Screen
from oreal_jax.data import PromptOrder, SolvedQuestion, read_examples
from oreal_jax.data.packing import Example, SizeLimits, pack
from oreal_jax.efficiency import PhaseTotals
from oreal_jax.errors import InputError
from oreal_jax.files import fingerprint
from oreal_jax.loading import OpenModel
from oreal_jax.train.lock import locked
from oreal_jax.train.metrics import check_finite, screen_line
from oreal_jax.train.programs import make_run_step
from oreal_jax.train.resume import Data, read_progress
from oreal_jax.train.run_directory import RunDirectory
from oreal_jax.train.scoring import put_batch
from oreal_jax.train.setup import open_run_model


def train_sft(
    config: SftConfig, run: str | Path, screen: Screen | None = None, profile: int = 0
) -> None:
    """Fine-tune, or resume fine-tuning, in the run directory `run`.

    `profile` steps are traced into RUN/profile.

    Raises:
        InputError: the config, model, examples or run directory cannot be used.
    """
    with locked(Path(run)):
        _train(config, Path(run), screen or Screen(), profile)


def _train(config: SftConfig, run: Path, screen: Screen, profile: int) -> None:
    model = open_run_model(config, run)
    check_loss(config)
    rows = read_examples(Path(config.examples))
    usable = usable_examples(config, model, rows, screen)
    all_rows = fingerprint([dataclasses.astuple(row) for row in rows])
    distributed.assert_equal(f"{config.examples}: fingerprint", all_rows)
    examples = list(usable.values())
    tokens = fingerprint([(e.prompt, e.completion) for e in examples])
    distributed.assert_equal(f"{config.examples}: fingerprint of its tokens", tokens)
    per_step = config.examples_per_step
    order = PromptOrder(examples, batch=per_step, seed=config.seed)
    limits = SizeLimits.from_examples(examples, per_step)
    steps = config.steps
    if not steps:
        finished, progress = read_progress(run)
        remaining = config.epochs * len(examples) - progress.taken
        steps = (finished or 0) + max(0, remaining) // per_step
    data = Data(config.examples, all_rows, fingerprint(list(usable)), per_step)
    with RunDirectory(
        config, run, screen, model, data, steps=steps, profile=profile
    ) as directory:
        train_step = make_run_step(config, directory.models, model.mesh)
        state = directory.state
        while (step := int(state.step)) < steps:
            items = order.batch(directory.data_position)
            batch_examples = [example for example, _ in items]
            batch, _ = pack(
                batch_examples,
                rows=config.packing.rows * sharding.count_row_shards(model.mesh),
                row_length=config.packing.row_length,
                limits=limits,
            )
            with distributed.enter_together():
                with screen.phase("update_actor", label=f"step {step}: "):
                    batch = put_batch(batch, model.mesh)
                    state, metrics, _ = train_step(state, batch)
                    directory.record_state(state)
                    metrics = check_finite(metrics, step)
                lengths = ((len(e.prompt), len(e.completion)) for e in batch_examples)
                work = efficiency.full_pass(lengths)
                flops = efficiency.training_flops(model.config, work)
                directory.finish_step(
                    metrics,
                    screen_line(step, steps, metrics),
                    {"update_actor": PhaseTotals(work.tokens, flops)},
                    tokens=work.tokens,
                )


def check_loss(config: SftConfig) -> None:
    """Raise InputError where the loss reads what SFT does not compute."""
    fields = losses.fields_read(
        config.loss, "old_log_probs", "reference_log_probs", "token_scores"
    )
    if fields:
        raise InputError(
            f"loss={config.loss}: reads {' and '.join(fields)}, which SFT does not "
            "compute; disable that term (kl_weight=0 for a KL to the reference model) "
            "or use BestOfNCloning()"
        )


def usable_examples(
    config: SftConfig,
    model: OpenModel,
    rows: Sequence[SolvedQuestion],
    screen: Screen,
) -> dict[int, Example]:
    """Return the examples that fit a packed row, by their index in the file.

    Raises:
        InputError: too few fit, or one has a token outside the vocabulary.
    """
    encoded = [model.chat.example(row.question, row.solution) for row in rows]
    tokens = itertools.chain.from_iterable(itertools.chain.from_iterable(encoded))
    model.config.check_tokens(tokens, config.examples)
    usable = {
        index: Example(prompt, completion)
        for index, (prompt, completion) in enumerate(encoded)
        if len(prompt) + len(completion) <= config.packing.row_length
    }
    screen.log(
        f"{config.examples}: {len(rows)} examples, {len(rows) - len(usable)} longer "
        f"than row_length={config.packing.row_length}"
    )
    if len(usable) < config.examples_per_step:
        raise InputError(
            f"{config.examples}: {len(usable)} usable examples, "
            f"examples_per_step={config.examples_per_step}"
        )
    return usable
