"""Supervised fine-tuning on solutions: the RL loop's train step without the rollout.

With solutions that a model found itself and a verifier judged correct, this is RFT, the
start that OREAL trains from.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from oreal_jax import distributed, efficiency, losses, program_cache
from oreal_jax.config import SftConfig
from oreal_jax.console import Screen
from oreal_jax.data import Chat, PromptOrder, SolvedQuestion, read_examples
from oreal_jax.data.packing import Example, SizeLimits, pack
from oreal_jax.efficiency import PhaseTotals
from oreal_jax.errors import InputError
from oreal_jax.files import fingerprint
from oreal_jax.model import ModelConfig
from oreal_jax.train.programs import mesh_of, update_of
from oreal_jax.train.session import Data, Session, chat_of, progress_of, source_of
from oreal_jax.train.step import place


def sft(config: SftConfig, run: Path, screen: Screen, profile: int = 0) -> None:
    """Fine-tunes, or goes on fine-tuning, in the run directory `run`; traces `profile`
    steps.

    Raises:
        InputError: the config, model, examples or run directory cannot be used.
    """
    source = source_of(config, run)
    mesh = mesh_of(config, source.config)
    program_cache.enable()
    check_loss(config)
    chat = chat_of(config, run, source)
    rows = read_examples(Path(config.examples))
    usable = usable_examples(config, source.config, chat, rows, screen)
    of_all = fingerprint([dataclasses.astuple(row) for row in rows])
    distributed.assert_equal(f"{config.examples}: fingerprint", of_all)
    examples = list(usable.values())
    tokens = fingerprint([(e.prompt, e.completion) for e in examples])
    distributed.assert_equal(f"{config.examples}: fingerprint of its tokens", tokens)
    order = PromptOrder(examples, batch=config.examples_per_step, seed=config.seed)
    limits = SizeLimits.from_examples(examples, config.examples_per_step)
    steps = config.steps
    if not steps:
        done, progress = progress_of(run)
        remaining = config.epochs * len(examples) - progress.taken
        steps = (done or 0) + max(0, remaining) // config.examples_per_step
    session = Session(
        config,
        run,
        screen,
        source=source,
        mesh=mesh,
        chat=chat,
        data=Data(
            config.examples,
            of_all,
            fingerprint(list(usable)),
            config.examples_per_step,
        ),
        steps=steps,
        profile=profile,
    )
    with session:
        update = update_of(config, session.learners, mesh)
        while session.step < steps:
            step = session.step
            taken = [example for example, _ in order.batch(session.taken)]
            lengths = ((len(e.prompt), len(e.completion)) for e in taken)
            learned = efficiency.full_pass(lengths)
            batch, _ = pack(
                taken,
                rows=session.rows,
                row_length=config.packing.row_length,
                limits=limits,
            )
            with distributed.together():
                with screen.phase("update_actor", label=f"step {step + 1}: "):
                    values, _ = session.learn(update, place(batch, mesh))
                line = f"step {step + 1:>{len(str(steps))}}/{steps}"
                line += (
                    f"  loss {values.get('actor/pg_loss', values['actor/loss']):.4f}"
                )
                flops = efficiency.training_flops(source.config, learned)
                done = {"update_actor": PhaseTotals(learned.tokens, flops)}
                session.finish_step(values, learned.tokens, line, done)


def check_loss(config: SftConfig) -> None:
    """Raises InputError where the loss reads what SFT does not compute."""
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
    shape: ModelConfig,
    chat: Chat,
    rows: Sequence[SolvedQuestion],
    screen: Screen,
) -> dict[int, Example]:
    """Prompt and solution tokens of every example that fits a row, by its place in the
    file."""
    encoded = [chat.example(row.question, row.solution) for row in rows]
    tokens = itertools.chain.from_iterable(itertools.chain.from_iterable(encoded))
    shape.require_tokens(tokens, config.examples)
    usable = {
        place: Example(prompt, completion)
        for place, (prompt, completion) in enumerate(encoded)
        if len(prompt) + len(completion) <= config.packing.row_length
    }
    screen.say(
        f"{config.examples}: {len(rows)} examples, {len(rows) - len(usable)} longer "
        f"than row_length={config.packing.row_length}"
    )
    if len(usable) < config.examples_per_step:
        raise InputError(
            f"{config.examples}: {len(usable)} usable examples, "
            f"examples_per_step={config.examples_per_step}"
        )
    return usable
