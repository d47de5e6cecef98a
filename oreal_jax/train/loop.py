"""The OREAL loop, in the order of the paper's algorithm.

    for each step:
        draw K completions of each prompt from the current policy
        judge them correct or incorrect
        take advantages over the K, keep one correct and one incorrect
        add the reference model's log-probabilities
        update the token reward model and the policy

Everything random is a function of (seed, step), and a checkpoint records how many
prompts were taken, so a run that was stopped resumes as if it had not been. Where
several processes run it, each draws and judges its share of the prompts; from there on
all of them have all completions and do the same.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orjson

from oreal_jax import distributed, losses, program_cache, rollout
from oreal_jax.config import TrainConfig
from oreal_jax.console import Screen
from oreal_jax.data import (
    Chat,
    Prompt,
    PromptOrder,
    build,
    load_prompts,
    repeat_by_difficulty,
)
from oreal_jax.data.packing import Batch, SizeLimits, pack
from oreal_jax.distributed import uninterrupted
from oreal_jax.errors import Failure, InputError
from oreal_jax.files import fingerprint, write_bytes, write_lines
from oreal_jax.model import ModelConfig, Params
from oreal_jax.rollout import Group, Trajectory
from oreal_jax.sampling import (
    Completion,
    Engine,
    Request,
    Statistics,
    token_table,
)
from oreal_jax.train import exchange, measures
from oreal_jax.train.examination import examination_of
from oreal_jax.train.exchange import Judged, Samples
from oreal_jax.train.programs import engine_of, limits_of, mesh_of, update_of
from oreal_jax.train.session import (
    Data,
    Session,
    chat_of,
    source_of,
)
from oreal_jax.train.step import TrainStep, place, reference_scorer
from oreal_jax.verify import Candidate, Pool
from oreal_jax.verify.completions import verify_completions
from oreal_jax.verify.llm_judge import Judge, judge_metrics


class Question(NamedTuple):
    """A prompt of a step, its number there, its tokens, and the first of its samples'
    numbers."""

    prompt: Prompt
    group: int
    tokens: list[int]
    first_sample: int


def train(config: TrainConfig, run: Path, screen: Screen, profile: int = 0) -> None:
    """Trains, or goes on training, in the run directory `run`; traces `profile` steps.

    Raises:
        InputError: the config, model, prompts or run directory cannot be used.
    """
    source = source_of(config, run)
    mesh = mesh_of(config, source.config)
    program_cache.enable()
    check_loss(config)
    chat = chat_of(config, run, source, config.stop_strings)
    judging = judge_of(config, screen)
    stop_tokens = chat.stop_tokens(config.stop_words)
    stop_table = token_table(config.stop_strings, chat.token_bytes, source.config.vocab)
    prompts = prompts_of(config, run, screen)
    rows = fingerprint([prompt.as_json() for prompt in prompts])
    distributed.assert_equal(f"{config.prompts}: fingerprint", rows)
    repeated, sizes = usable_prompts(config, source.config, prompts, chat, screen)
    limits = limits_of(config, min(sizes))
    order = PromptOrder(repeated, batch=config.prompts_per_step, seed=config.seed)
    stops = stop_tokens, stop_table
    engine = engine_of(config, source.config, mesh, *stops, max(sizes))
    examination = examination_of(config, chat, prompts, engine)
    session = Session(
        config,
        run,
        screen,
        source=source,
        mesh=mesh,
        chat=chat,
        data=Data(
            config.prompts,
            rows,
            fingerprint([prompt.id for prompt in repeated]),
            config.prompts_per_step,
        ),
        steps=config.steps,
        profile=profile,
    )
    if distributed.is_first() and not (run / "data").is_dir():
        build(prompts, run / "data")
    verification = config.verification
    pool = Pool(verification.workers, verification.deadline)
    with session, pool, judging as judge:
        with distributed.together():
            reference = session.load_reference()
        add_reference = reference_scorer(session.model, mesh, session.dtype)
        update = update_of(config, session.learners, mesh)
        while session.step < config.steps:
            examination.take(session, pool, judge)
            step = session.step
            asked = questions(session, config, order)
            mine = distributed.share(asked)
            judged = sample_and_judge(session, config, mine, engine, pool, judge)
            with uninterrupted():
                judged = distributed.gather_shares(
                    judged, exchange.encode, exchange.decode
                )
                groups = trajectories(config, asked, judged)
                usable = groups
                if verification.undecided == "drop":
                    usable = [rollout.decided(group) for group in groups]
                kept = rollout.keep_some(usable, config.keep, config.seed, step)
                values = rollout.metrics(groups, kept) | how_it_went(engine, judge)
                if kept:
                    values |= learn(
                        session, kept, limits, reference, add_reference, update
                    )
                    measures.require_agreement(values, config, session.step)
                else:
                    session.skip_step()
                with screen.phase("write", label=f"step {step + 1}: "):
                    if distributed.is_first():
                        write = functools.partial(
                            write_trajectories, run, step, groups, chat
                        )
                        session.writer.submit(write)
                said = line(step, config.steps, values)
                tokens = rollout.token_count(groups)
                frozen = step < config.freeze_steps
                done = measures.work(session.learners, groups, kept, frozen)
                session.finish_step(values, tokens, said, done)
        examination.take(session, pool, judge)


def check_loss(config: TrainConfig) -> None:
    """Raises InputError where the loss cannot train the policy."""
    scores, samples = config.token_reward is not None, config.samples_per_prompt
    if losses.has_gradient(config.loss, samples, token_scores=scores):
        return
    message = (
        f"loss={config.loss}: the gradient is zero for every token, so nothing would "
        "be learned"
    )
    if not scores:
        presets = [
            name
            for name, loss in losses.presets.NAMED.items()
            if losses.has_gradient(loss, samples, token_scores=False)
        ]
        message = (
            f"token_reward=None with {message}; without a token reward model all "
            "token scores are 0; presets that train without one: "
            f"{', '.join(presets)}"
        )
    raise InputError(message)


def prompts_of(config: TrainConfig, run: Path, screen: Screen) -> list[Prompt]:
    """The prompts that a run began with, of which it keeps a copy.

    Raises:
        InputError: they cannot be read.
    """
    copy = run / "data"
    if not copy.is_dir():
        return load_prompts(config.prompts)
    prompts = load_prompts(str(copy))
    if Path(config.prompts).exists():
        try:
            changed = load_prompts(config.prompts) != prompts
        except InputError:
            changed = True
        if changed:
            screen.say(
                f"{config.prompts}: has changed since {run} began, which continues "
                f"with its copy in {copy}; to train on the new prompts, start a new run"
            )
    return prompts


def judge_of(
    config: TrainConfig, screen: Screen
) -> contextlib.AbstractContextManager[Judge | None]:
    """The judge to ask after the rule, where the config names one.

    Raises:
        InputError: its hosts or its model are not usable names.
    """
    chosen, first = config.verification, distributed.is_first()
    if not chosen.judge_hosts:
        return contextlib.nullcontext()
    return Judge(
        chosen.judge_hosts,
        chosen.judge_model,
        concurrency=max(1, chosen.judge_concurrency // distributed.process_count()),
        timeout=chosen.judge_timeout,
        tries=chosen.judge_tries,
        lost=chosen.judge_lost,
        # A judge that is lost stops all, so a process without a screen says it too.
        log=screen.say if first else distributed.warn,
    )


def learn(
    session: Session,
    kept: Sequence[Trajectory],
    limits: SizeLimits,
    reference: Params,
    add_reference: Callable[[Params, Batch], Batch],
    update: TrainStep,
) -> dict[str, float]:
    """Updates the models on the kept completions; what there is to say about it."""
    label = f"step {session.step + 1}: "
    batch, slots = pack(
        [trajectory.example() for trajectory in kept],
        rows=session.rows,
        row_length=session.config.packing.row_length,
        limits=limits,
    )
    batch = place(batch, session.mesh)
    with session.screen.phase("ref", label=label):
        batch = jax.block_until_ready(add_reference(reference, batch))
    with session.screen.phase("update_actor", label=label):
        measured, scores = session.learn(update, batch)
    return measured | measures.agreement(kept, slots, scores, batch)


def usable_prompts(
    config: TrainConfig,
    shape: ModelConfig,
    prompts: Sequence[Prompt],
    chat: Chat,
    screen: Screen,
) -> tuple[list[Prompt], list[int]]:
    """The prompts that are short enough, repeated by difficulty as published, and the
    lengths of the short ones in tokens, without repetition."""
    encoded = [chat.encode(prompt.question) for prompt in prompts]
    shape.require_tokens(itertools.chain.from_iterable(encoded), config.prompts)
    sizes = [len(tokens) for tokens in encoded]
    fits = [size <= config.max_prompt_tokens for size in sizes]
    short = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
    if not short:
        raise InputError(
            f"{config.prompts}: all {len(prompts)} prompts are longer than "
            f"max_prompt_tokens={config.max_prompt_tokens}"
        )
    repeated = repeat_by_difficulty(short, config.difficulty)
    left_out = len(prompts) - len(short)
    screen.say(
        f"{config.prompts}: {len(prompts)} prompts, {left_out} over "
        f"{config.max_prompt_tokens} tokens, {len(repeated)} after balancing difficulty"
    )
    return repeated, [size for size, fit in zip(sizes, fits, strict=True) if fit]


def questions(
    session: Session, config: TrainConfig, order: PromptOrder
) -> list[Question]:
    """This step's prompts."""
    return [
        Question(
            prompt,
            group,
            session.chat.encode(prompt.question),
            occurrence * config.samples_per_prompt,
        )
        for group, (prompt, occurrence) in enumerate(order.batch(session.taken))
    ]


def sample_and_judge(
    session: Session,
    config: TrainConfig,
    asked: Sequence[Question],
    engine: Engine,
    pool: Pool,
    judge: Judge | None = None,
) -> list[Samples]:
    """K judged completions of each question. Interrupted, it leaves those that are
    drawn in `RUN/interrupted/`; the step will be done anew, and draw the same."""
    finished: dict[tuple[int, int], tuple[Completion, str]] = {}
    try:
        drawn = sample(session, config, asked, engine, pool, finished)
        return judge_all(session, asked, drawn, pool, judge)
    except KeyboardInterrupt:
        if finished:
            leave_interrupted(session, config, asked, finished)
        raise


def judge_all(
    session: Session,
    asked: Sequence[Question],
    drawn: Sequence[Sequence[tuple[Completion, str]]],
    pool: Pool,
    judge: Judge | None,
) -> list[Samples]:
    """The completions of each question with their verdicts."""
    label = f"step {session.step + 1}: "
    candidates = [
        Candidate(
            question.prompt.question,
            question.prompt.gold_answer,
            text,
            completion.finish_reason,
        )
        for question, group in zip(asked, drawn, strict=True)
        for completion, text in group
    ]
    total = len(candidates)
    with session.screen.phase("verify", total=total, label=label) as advance:
        verdicts = iter(verify_completions(candidates, pool, judge, advance))
    return [[Judged(*each, next(verdicts)) for each in group] for group in drawn]


def trajectories(
    config: TrainConfig, asked: Sequence[Question], judged: Sequence[Samples]
) -> list[Group]:
    """The judged completions of each question with their advantages."""
    weigh = rollout.advantages
    if config.verification.undecided == "drop":
        weigh = rollout.advantages_of_decided
    verdicts = [[one.verdict for one in group] for group in judged]
    advantages = weigh(verdicts, config.loss.advantage)
    return [
        [
            Trajectory(
                prompt=question.prompt,
                group=question.group,
                sample=question.first_sample + k,
                prompt_tokens=question.tokens,
                completion=one.completion,
                old_log_probs=old_log_probs(one.completion),
                text=one.text,
                verdict=one.verdict,
                advantage=float(advantages[question.group, k]),
            )
            for k, one in enumerate(group)
        ]
        for question, group in zip(asked, judged, strict=True)
    ]


def how_it_went(engine: Engine, judge: Judge | None) -> dict[str, float]:
    """What engines and judges of all processes say of this step."""
    said = distributed.gather_values([engine.statistics, judge and judge.take_counts()])
    found = Statistics.together([Statistics(*each) for each, _ in said]).metrics()
    return found | (judge_metrics([counts for _, counts in said]) if judge else {})


def sample(
    session: Session,
    config: TrainConfig,
    asked: Sequence[Question],
    engine: Engine,
    pool: Pool,
    finished: dict[tuple[int, int], tuple[Completion, str]],
) -> list[list[tuple[Completion, str]]]:
    """K completions of each question with their texts; those that are finished lie in
    `finished` by question and sample, and are judged while others are drawn."""
    step, K = session.step, config.samples_per_prompt

    def note(n: int, k: int, completion: Completion) -> None:
        text = session.chat.decode(completion.tokens)
        finished[n, k] = completion, text
        if completion.finish_reason == "stop":
            # The pool remembers the verdict.
            pool.submit(text, asked[n].prompt.gold_answer)

    with distributed.together():
        weights = engine.weights(session.state.policy.params)
    label, total = f"step {step + 1}: ", len(asked) * K
    requests = [
        Request(q.tokens, config.sampling, q.prompt.key, q.first_sample, config.seed)
        for q in asked
    ]
    with session.screen.phase("gen", total=total, label=label) as advance:
        try:
            engine.sample(
                weights,
                requests,
                K,
                step=step,
                renormalise=config.log_probs == "sampled",
                on_progress=lambda tokens, finished: advance(finished, tokens),
                on_finished=note,
            )
        except Failure as error:
            raise type(error)(f"{label}{error}; the step is not saved") from None
    return [[finished[n, k] for k in range(K)] for n in range(len(asked))]


def leave_interrupted(
    session: Session,
    config: TrainConfig,
    asked: Sequence[Question],
    finished: Mapping[tuple[int, int], tuple[Completion, str]],
) -> None:
    """Writes what an interrupted step had drawn."""
    rows = [
        {
            "step": session.step,
            "id": asked[n].prompt.id,
            "group": asked[n].group,
            "sample": asked[n].first_sample + k,
            "question": asked[n].prompt.question,
            "gold_answer": asked[n].prompt.gold_answer,
            "completion": text,
            "tokens": len(completion.tokens),
            "finish_reason": completion.finish_reason,
        }
        for (n, k), (completion, text) in sorted(
            finished.items(), key=lambda item: item[0]
        )
    ]
    path = interrupted_path(session.run, session.step, distributed.process_index())
    write_lines(path, rows)
    total = len(asked) * config.samples_per_prompt
    session.screen.say(f"{len(rows)} of {total} completions are in {path}")


def old_log_probs(completion: Completion) -> np.ndarray:
    """The sampler's word on the same distribution."""
    sampled = completion.sampled_log_probs  # drawn only where the config asks for them
    return completion.log_probs if sampled is None else sampled


def write_trajectories(
    run: Path, step: int, groups: Sequence[Group], chat: Chat
) -> None:
    """All completions of a step as JSON lines, whole or not at all."""
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    lines = (
        orjson.dumps(trajectory.as_json(step, chat.pieces), option=options)
        for group in groups
        for trajectory in group
    )
    path = run / "trajectories" / f"step_{step:06d}.jsonl"
    write_bytes(path, b"".join(lines))
    for left in interrupted_path(run, step, 0).parent.glob(f"step_{step:06d}.*"):
        left.unlink()


def interrupted_path(run: Path, step: int, process: int) -> Path:
    """Where a process's completions of a step that was interrupted lie until the step
    is whole."""
    of = f".process_{process}" if process else ""
    return run / "interrupted" / f"step_{step:06d}{of}.jsonl"


def line(step: int, steps: int, values: dict[str, float]) -> str:
    """One readable line about a step."""
    text = (
        f"step {step + 1:>{len(str(steps))}}/{steps}  "
        f"correct {values['critic/score/mean']:6.1%}  "
        f"tokens {values['response_length/mean']:.0f}  "
        f"kept {values['oreal/kept']:.0f}  "
    )
    if not values["oreal/kept"]:
        return text + "no update: every prompt was all correct or all incorrect"
    text += (
        f"loss {values.get('actor/pg_loss', values['actor/loss']):+.4f}  "
        f"kl {values.get('actor/kl_loss', 0):.4f}"
    )
    if "token_reward/loss" in values:
        text += f"  token reward {values['token_reward/loss']:.3f}"
    return text
