"""What several verbs share: options that say how to draw, and the model they open."""

import argparse
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from oreal_jax.errors import InputError

T = TypeVar("T")
Verb = Callable[..., argparse.ArgumentParser]  # (name, call, help, example)


def drawing_defaults() -> dict[str, Any]:
    """The options that completions depend on, with their defaults."""
    made = argparse.ArgumentParser()
    model_options(made, required=False)
    sampling_options(made, greedy=False)
    found = vars(made.parse_args([]))
    return {k: v for k, v in found.items() if k not in ("model", "rows")}


def drawing_options(parsed: argparse.Namespace) -> dict[str, Any]:
    """Those of them that a verb has, as they were given."""
    given = vars(parsed)
    return {name: given[name] for name in drawing_defaults() if name in given}


def model_options(made: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds the model, its system prompt, and how it decodes."""
    made.add_argument(
        "--model", required=required, help="a Hugging Face directory or a run directory"
    )
    made.add_argument(
        "--system-prompt",
        help="system message (default: the run's, else the chat template's own)",
    )
    made.add_argument(
        "--rows", type=int, default=64, help="completions drawn at a time"
    )
    made.add_argument(
        "--weights",
        choices=["full", "int8"],
        default="full",
        help="int8: weights in eight bits while decoding",
    )
    made.add_argument(
        "--cache",
        choices=["full", "float8"],
        default="full",
        help="float8: keys and values in eight bits",
    )


def sampling_options(made: argparse.ArgumentParser, *, greedy: bool = True) -> None:
    """Adds how tokens are chosen; `greedy` adds the flag of that name."""
    made.add_argument(
        "--temperature", type=float, default=1.0, help="0: always the likeliest"
    )
    made.add_argument(
        "--top-p", type=float, default=0.9, help="likeliest tokens of this mass; 1: off"
    )
    made.add_argument("--top-k", type=int, default=0, help="likeliest tokens; 0: off")
    made.add_argument(
        "--min-p", type=float, default=0.0, help="share of the likeliest; 0: off"
    )
    made.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="divides the logits of tokens that prompt or completion have; 1: off",
    )
    made.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        help="taken from the logits of tokens that the completion has",
    )
    made.add_argument(
        "--frequency-penalty",
        type=float,
        default=0.0,
        help="taken from a token's logit each time the completion has it",
    )
    made.add_argument(
        "--logit-bias",
        type=bias,
        action="append",
        default=[],
        metavar="TOKEN=VALUE",
        help="added to the logit of a token, given by its number; may be repeated",
    )
    made.add_argument(
        "--max-tokens", type=int, default=512, help="tokens of a completion at most"
    )
    made.add_argument("--seed", type=int, default=0, help="of all random numbers")
    if greedy:
        made.add_argument("--greedy", action="store_true", help="always the likeliest")


def config_options(made: argparse.ArgumentParser) -> None:
    """Adds the config file and what is changed in it."""
    made.add_argument("config", type=Path, help="a Python file defining `config`")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a field, dotted where nested: --set policy.learning_rate=1e-6",
    )


def folder(made: argparse.ArgumentParser) -> None:
    """Adds where presets are looked for."""
    made.add_argument(
        "--folder",
        type=Path,
        default=Path("data"),
        help="where a preset NAME is read from NAME.jsonl, before the hub is asked",
    )


def judge_options(made: argparse.ArgumentParser) -> None:
    """Adds the hosts and the model of the judge."""
    made.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="URL",
        help="an OpenAI-compatible API (.../v1), asked where the rule does not say "
        "correct; may be repeated",
    )
    made.add_argument("--judge-model", default="", help="the model to ask there")


@contextlib.contextmanager
def judge_of(parsed: argparse.Namespace, screen) -> Iterator[Any]:
    """The judge of these options, None without; says in the end what it did.

    Where its hosts are lost the rule goes on alone, which is said, too.
    """
    from oreal_jax.verify.llm_judge import Judge, judge_metrics

    if not parsed.judge:
        if parsed.judge_model:
            raise InputError("--judge-model without --judge: where is it served?")
        yield None
        return
    with Judge(parsed.judge, parsed.judge_model, lost="rule", log=screen.say) as judge:
        yield judge
        metrics = judge_metrics([judge.take_counts()])
        told = {name: n for name, n in metrics.items() if n}
        screen.say("  ".join(f"{name} {n:g}" for name, n in told.items()))


def at_least(least: int, option: str, value: int) -> None:
    """Raises InputError where the value of an option is too small."""
    if value < least:
        raise InputError(f"{option} {value}: must be at least {least}")


def check_seed(seed: int) -> None:
    """Raises InputError where a seed is no number that random numbers begin with."""
    if not 0 <= seed < 2**31:
        raise InputError(f"--seed {seed}: must be from 0 to {2**31 - 1}")


def bias(text: str) -> tuple[int, float]:
    """A token and what is added to its logit, from "1234=-5"."""
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected e.g. 1234=-5") from None


class Opened:
    """A model ready to complete prompts with `sampling`; `stops` are stop strings."""

    def __init__(self, parsed: argparse.Namespace, sampling, stops=()):
        from oreal_jax import program_cache, sharding
        from oreal_jax.checkpoints.source import open_model
        from oreal_jax.data import Chat, load_tokenizer
        from oreal_jax.sampling import Engine, token_table
        from oreal_jax.train.programs import compute_dtype

        at_least(1, "--rows", parsed.rows)
        source = self.source = open_model(parsed.model)
        mesh = sharding.make_mesh(sharding.MeshShape(), source.config)
        program_cache.enable()
        dtype = compute_dtype("auto", mesh)
        # While the tokenizer's library is imported, which takes about as long.
        self.load = in_background(lambda: source.load(mesh, dtype))
        system_prompt = parsed.system_prompt
        if system_prompt is None:
            system_prompt = source.system_prompt
        tokenizer = load_tokenizer(source.files)
        words = [text for text in stops if text in tokenizer.all_special_tokens]
        strings = [text for text in stops if text not in words]
        self.chat = Chat(tokenizer, system_prompt, stop_strings=strings)
        self.engine = Engine(
            source.config,
            mesh,
            self.chat.stop_tokens(words),
            stop_table=token_table(strings, self.chat.token_bytes, source.config.vocab),
            rows=parsed.rows,
            dtype=dtype,
            weights=parsed.weights,
            cache=parsed.cache,
        )
        self.engine.check_sampling(sampling)
        self.sampling = sampling


def in_background(work: Callable[[], T]) -> Callable[[], T]:
    """Starts `work` in a thread that the end of the process does not wait for; returns
    a function that waits for its result or raises its error."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result


def sampling_of(parsed: argparse.Namespace, greedy: bool):
    """The sampling that these options ask for."""
    from oreal_jax.sampling import Sampling

    check_seed(parsed.seed)
    return Sampling(
        max_tokens=parsed.max_tokens,
        temperature=0.0 if greedy else parsed.temperature,
        top_p=parsed.top_p,
        top_k=parsed.top_k,
        min_p=parsed.min_p,
        repetition_penalty=parsed.repetition_penalty,
        presence_penalty=parsed.presence_penalty,
        frequency_penalty=parsed.frequency_penalty,
        logit_bias=tuple(parsed.logit_bias),
    )
