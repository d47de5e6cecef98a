"""Options that several verbs share, and the model that they open.

Options are not read from the dataclass `Sampling`: building a parser must not import
JAX, and the command line has defaults of its own.
"""

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

# Fields of `Sampling` that are options: default and help.
SAMPLING = {
    "temperature": (1.0, "0: always the likeliest"),
    "top_p": (0.9, "likeliest tokens of this mass; 1: off"),
    "top_k": (0, "likeliest tokens; 0: off"),
    "min_p": (0.0, "share of the likeliest; 0: off"),
    "repetition_penalty": (
        1.0,
        "divides the logits of tokens that prompt or completion have; 1: off",
    ),
    "presence_penalty": (
        0.0,
        "subtracted from the logits of tokens that the completion has",
    ),
    "frequency_penalty": (
        0.0,
        "subtracted from a token's logit each time the completion has it",
    ),
    "max_tokens": (512, "maximum tokens of a completion"),
}


def model_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the model, its system prompt, and how it decodes."""
    parser.add_argument(
        "--model", required=required, help="a Hugging Face directory or a run directory"
    )
    parser.add_argument(
        "--system-prompt",
        help="system message (default: the run's, else the chat template's own)",
    )
    parser.add_argument(
        "--rows", type=int, default=64, help="completions decoded at the same time"
    )
    for option, choice, what in [
        ("--weights", "int8", "int8: weights in eight bits while decoding"),
        ("--cache", "float8", "float8: keys and values in eight bits"),
    ]:
        choices = ["full", choice]
        parser.add_argument(option, choices=choices, default="full", help=what)


def sampling_options(parser: argparse.ArgumentParser, *, greedy: bool = True) -> None:
    """Add how tokens are sampled; `greedy` adds the flag of that name."""
    for name, (default, what) in SAMPLING.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default, help=what)
    parser.add_argument(
        "--logit-bias",
        type=bias,
        action="append",
        default=[],
        metavar="TOKEN=VALUE",
        help="added to the logit of a token, given by its number; may be repeated",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    if greedy:
        parser.add_argument(
            "--greedy", action="store_true", help="always the likeliest"
        )


def generation_defaults() -> dict[str, Any]:
    """The options that determine completions, with their defaults."""
    parser = argparse.ArgumentParser()
    model_options(parser, required=False)
    sampling_options(parser, greedy=False)
    defaults = vars(parser.parse_args([]))
    return {k: v for k, v in defaults.items() if k not in ("model", "rows")}


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of `generation_defaults` that a verb has, with their values."""
    defaults = generation_defaults()
    return {k: v for k, v in vars(args).items() if k in defaults}


def config_options(parser: argparse.ArgumentParser) -> None:
    """Add the config file and changes to it."""
    parser.add_argument("config", type=Path, help="a Python file defining `config`")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a field, dotted where nested: --set policy.learning_rate=1e-6",
    )


def folder(parser: argparse.ArgumentParser) -> None:
    """Add the folder of presets."""
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("data"),
        help="a preset NAME is read from NAME.jsonl here, else downloaded from the hub",
    )


def judge_options(parser: argparse.ArgumentParser) -> None:
    """Add the hosts and the model of the judge."""
    parser.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="URL",
        help="an OpenAI-compatible API (.../v1) that judges answers which the rule "
        "does not find correct; may be repeated",
    )
    parser.add_argument("--judge-model", default="", help="the model to request there")


@contextlib.contextmanager
def open_judge(args: argparse.Namespace, screen) -> Iterator[Any]:
    """The judge of these options, None without hosts; logs its metrics at the end.

    If all hosts are lost, the rule judges alone, which is logged.
    """
    from oreal_jax.verify.llm_judge import Judge, judge_metrics

    if not args.judge:
        if args.judge_model:
            raise InputError("--judge-model without --judge: where is it served?")
        yield None
        return
    with Judge(args.judge, args.judge_model, lost="rule", log=screen.log) as judge:
        yield judge
        metrics = judge_metrics([judge.take_counts()])
        screen.log("  ".join(f"{name} {n:g}" for name, n in metrics.items() if n))


def check_min(minimum: int, option: str, value: int) -> None:
    """Raise InputError if the value of an option is below `minimum`."""
    if value < minimum:
        raise InputError(f"{option} {value}: must be at least {minimum}")


def check_seed(seed: int) -> None:
    """Raise InputError if a seed is negative or has more than 31 bits."""
    if not 0 <= seed < 2**31:
        raise InputError(f"--seed {seed}: must be from 0 to {2**31 - 1}")


def bias(text: str) -> tuple[int, float]:
    """Parse a token and the bias of its logit, such as "1234=-5"."""
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected e.g. 1234=-5") from None


class GenerationModel:
    """A model ready to complete prompts with `sampling`; `stops` are stop strings.

    `load` waits for its weights.
    """

    def __init__(self, args: argparse.Namespace, sampling, stops=()):
        from oreal_jax import program_cache
        from oreal_jax.checkpoints.source import open_model
        from oreal_jax.data import Chat, load_tokenizer
        from oreal_jax.mesh import MeshShape, make_mesh
        from oreal_jax.sampling import Engine, token_table
        from oreal_jax.train.programs import compute_dtype

        check_min(1, "--rows", args.rows)
        source = self.source = open_model(args.model)
        mesh = make_mesh(MeshShape(), source.config)
        program_cache.enable()
        dtype = compute_dtype("auto", mesh)
        # Importing the tokenizer's library takes about as long.
        self.load = in_background(lambda: source.load(mesh, dtype))
        system_prompt = args.system_prompt
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
            rows=args.rows,
            dtype=dtype,
            weights=args.weights,
            cache=args.cache,
        )
        self.engine.check_sampling(sampling)
        self.sampling = sampling


def in_background(work: Callable[[], T]) -> Callable[[], T]:
    """Start `work` in a thread that does not keep the process alive.

    Returns a function that waits for the result, or raises the error; it can be called
    once and keeps no reference to the result.
    """
    futures: list[Future[T]] = [Future()]

    def run(future: Future[T]) -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, args=futures, daemon=True).start()
    return lambda: futures.pop().result()


def make_sampling(args: argparse.Namespace, greedy: bool):
    """The `Sampling` of these options."""
    from oreal_jax.sampling import Sampling

    check_seed(args.seed)
    values = {name: getattr(args, name) for name in SAMPLING}
    if greedy:
        values["temperature"] = 0.0
    return Sampling(**values, logit_bias=tuple(args.logit_bias))
