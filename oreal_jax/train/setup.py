"""Set-up of a run: everything that is read and checked before the first step."""

import contextlib
import datetime
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from oreal_jax import distributed, losses, program_cache
from oreal_jax.config import SftConfig, TrainConfig
from oreal_jax.console import Screen
from oreal_jax.data import (
    Chat,
    Prompt,
    PromptOrder,
    load_prompts,
    load_tokenizer,
    repeat_by_difficulty,
)
from oreal_jax.data.chat import read_date
from oreal_jax.data.packing import SizeLimits
from oreal_jax.errors import InputError
from oreal_jax.files import fingerprint
from oreal_jax.loading import OpenModel, compute_dtype
from oreal_jax.sampling import Engine
from oreal_jax.train.evaluator import PolicyEvaluator, load_evaluation_sets
from oreal_jax.train.programs import make_engine, make_run_mesh, step_size_limits
from oreal_jax.train.resume import Data, open_source
from oreal_jax.train.trackers import check_trackers
from oreal_jax.verify.llm_judge import Judge


class Setup(NamedTuple):
    """The checked inputs of a run; `limits` bound the batches of all its steps."""

    model: OpenModel
    prompts: list[Prompt]
    data: Data
    order: PromptOrder
    limits: SizeLimits
    engine: Engine
    evaluator: PolicyEvaluator


def set_up(config: TrainConfig, run: Path, screen: Screen) -> Setup:
    """Read and check model, prompts and evaluation sets; write nothing.

    Raises:
        InputError: the config, model, prompts or evaluation sets cannot be used.
    """
    model = open_run_model(config, run, config.stop_strings, config.stop_words)
    check_loss(config)
    prompts = load_run_prompts(config, run, screen)
    rows = fingerprint([prompt.as_json() for prompt in prompts])
    distributed.assert_equal(f"{config.prompts}: fingerprint", rows)
    repeated, lengths = usable_prompts(config, model, prompts, screen)
    engine = make_engine(config, model.make_engine, max(lengths))
    sets = load_evaluation_sets(config, model.chat, prompts, engine)
    return Setup(
        model=model,
        prompts=prompts,
        data=Data(
            config.prompts,
            rows,
            fingerprint([prompt.id for prompt in repeated]),
            config.prompts_per_step,
        ),
        order=PromptOrder(repeated, batch=config.prompts_per_step, seed=config.seed),
        limits=step_size_limits(config, min(lengths)),
        engine=engine,
        evaluator=PolicyEvaluator(
            config=config,
            run=run,
            screen=screen,
            chat=model.chat,
            engine=engine,
            sets=sets,
        ),
    )


def open_run_model(
    config: TrainConfig | SftConfig,
    run: Path,
    stop_strings: Sequence[str] = (),
    stop_words: Sequence[str] = (),
) -> OpenModel:
    """Open the model of a run; its chat template and date stay as when it began.

    Raises:
        InputError: model, mesh, tokenizer or template cannot be used.
    """
    check_trackers(config)
    source = open_source(config, run)
    mesh = make_run_mesh(config, source.config)
    program_cache.enable()
    template = None
    if config.chat_template and source.path != run:
        template = Path(config.chat_template)
    tokenizer = load_tokenizer(source.files)
    date = read_date(source.files) if source.path == run else None
    today = datetime.date.today().isoformat()
    today = distributed.gather_values(today)[0]  # midnight may be between processes
    return OpenModel(
        source=source,
        mesh=mesh,
        dtype=compute_dtype(config.compute, mesh),
        chat=Chat(
            tokenizer,
            config.system_prompt,
            template,
            stop_strings,
            dict(config.template_vars),
            date or datetime.date.fromisoformat(today),
        ),
        stop_words=stop_words,
    )


def check_loss(config: TrainConfig) -> None:
    """Raise InputError where the loss cannot train the policy."""
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


def load_run_prompts(config: TrainConfig, run: Path, screen: Screen) -> list[Prompt]:
    """Load the prompts that a run began with, of which it keeps a copy.

    Raises:
        InputError: they cannot be read.
    """
    copy = run / "data"
    if not copy.is_dir():
        return load_prompts(config.prompts, config.question, config.answer)
    prompts = load_prompts(str(copy))
    if Path(config.prompts).exists():
        try:
            original = load_prompts(config.prompts, config.question, config.answer)
            changed = original != prompts
        except InputError:
            changed = True
        if changed:
            screen.log(
                f"{config.prompts}: has changed since {run} began, which continues "
                f"with its copy in {copy}; to train on the new prompts, start a new run"
            )
    return prompts


def usable_prompts(
    config: TrainConfig, model: OpenModel, prompts: Sequence[Prompt], screen: Screen
) -> tuple[list[Prompt], list[int]]:
    """Return the prompts that are short enough, repeated by difficulty as published.

    Also returns their lengths in tokens, without repetition.

    Raises:
        InputError: no prompt remains, or one has a token outside the vocabulary.
    """
    encoded = [model.chat.encode(prompt.question) for prompt in prompts]
    model.config.check_tokens(itertools.chain.from_iterable(encoded), config.prompts)
    lengths = [len(tokens) for tokens in encoded]
    fits = [length <= config.max_prompt_tokens for length in lengths]
    short = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
    if not short:
        raise InputError(
            f"{config.prompts}: all {len(prompts)} prompts are longer than "
            f"max_prompt_tokens={config.max_prompt_tokens}"
        )
    repeated = repeat_by_difficulty(short, config.difficulty)
    screen.log(
        f"{config.prompts}: {len(prompts)} prompts, {len(prompts) - len(short)} over "
        f"{config.max_prompt_tokens} tokens, {len(repeated)} after balancing difficulty"
    )
    return repeated, [n for n, fit in zip(lengths, fits, strict=True) if fit]


def open_judge(
    config: TrainConfig, screen: Screen
) -> contextlib.AbstractContextManager[Judge | None]:
    """Return the LLM judge that decides after the rule, None if there is none.

    Raises:
        InputError: its hosts or its model are not usable names.
    """
    settings, first = config.verification, distributed.is_first()
    if not settings.judge_hosts:
        return contextlib.nullcontext()
    processes = distributed.process_count()
    return Judge(
        settings.judge_hosts,
        settings.judge_model,
        concurrency=max(1, settings.judge_concurrency // processes),
        max_tokens=settings.judge_max_tokens,
        timeout=settings.judge_timeout,
        tries=settings.judge_tries,
        lost=settings.judge_lost,
        # A lost judge stops all processes, so those without a screen report it too.
        log=screen.log if first else distributed.warn,
    )
