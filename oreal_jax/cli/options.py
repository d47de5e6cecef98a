"""Options that several verbs share, and the model that they load.

Help texts are those of the fields of `Sampling`, read from its source, because building
a parser must not import JAX; the command line has defaults of its own.
"""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from oreal_jax.errors import InputError
from oreal_jax.field_texts import class_node, field_texts

Verb = Callable[..., argparse.ArgumentParser]  # (name, call, help, example)

# Fields of `Sampling` that are options, with the defaults of the command line.
SAMPLING = {
    "temperature": 1.0,
    "top_p": 0.9,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "max_tokens": 512,
}
RULE = "oreal_jax.verify.rule.by_rule"  # in the config.json of a run
SAMPLING_SOURCE = Path(__file__).parents[1] / "sampling" / "parameters.py"


def model_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add options for the model, its chat template and decoding."""
    parser.add_argument(
        "--model",
        required=required,
        help="a Hugging Face model directory or a run directory (RUN/best: the run's "
        "best policy, RUN/reference: its initial policy)",
    )
    step_option(parser)
    parser.add_argument(
        "--system-prompt",
        help="system message (default: the run's, else the chat template's own)",
    )
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="a Jinja file that replaces the model's chat template",
    )
    parser.add_argument(
        "--template-var",
        type=template_var,
        action="append",
        metavar="NAME=VALUE",
        help="set a variable of the chat template: enable_thinking=false; may be "
        "repeated",
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


def step_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that selects a checkpoint of a run."""
    parser.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="the policy after N steps of the run (default: the newest checkpoint)",
    )


def sampling_options(parser: argparse.ArgumentParser, *, greedy: bool = True) -> None:
    """Add how tokens are sampled; `greedy` adds the flag of that name."""
    texts = field_texts(class_node(SAMPLING_SOURCE, "Sampling"))
    for name, default in SAMPLING.items():
        option, text = f"--{name.replace('_', '-')}", texts[name].removesuffix(".")
        text = text[0].lower() + text[1:]
        parser.add_argument(option, type=type(default), default=default, help=text)
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
            "--greedy", action="store_true", help="always the most likely token"
        )


def generation_defaults() -> dict[str, Any]:
    """Return the options that determine completions, with their defaults."""
    parser = argparse.ArgumentParser()
    model_options(parser, required=False)
    sampling_options(parser, greedy=False)
    defaults = vars(parser.parse_args([]))
    return {k: v for k, v in defaults.items() if k not in ("model", "rows")}


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `generation_defaults` that a verb has, with values."""
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


def verifier_options(parser: argparse.ArgumentParser) -> None:
    """Add the option for the config file whose verifiers are used."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="verify with the verifiers and the deadline of this config file of `oreal "
        "train` (default: with the rule)",
    )


def pool_settings(args: argparse.Namespace) -> tuple:
    """Return `--config`'s deadline and verifiers for `Pool`; () without `--config`.

    Raises:
        InputError: the file has no config of `oreal train`.
    """
    if not args.config:
        return ()
    from oreal_jax.config import TrainConfig
    from oreal_jax.config_loading import load

    verification = load(args.config, TrainConfig).verification
    return verification.deadline, verification.verifiers


def log_verifiers(
    args: argparse.Namespace, settings: Mapping[str, Any], log: Callable[[str], None]
) -> None:
    """Log the verifiers that a run was trained with, if they are not used here.

    A run directory records their names but not their file, so they are not imported.
    """
    names = settings.get("verification", {}).get("verifiers", [RULE])
    if names != [RULE] and not args.config:
        log(
            f"{args.model}: trained with the verifiers {', '.join(names)}; using the "
            "rule only (--config FILE: use the verifiers of a config file)"
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
    parser.add_argument(
        "--judge-model", default="", metavar="NAME", help="the model to request there"
    )
    parser.add_argument(
        "--judge-max-tokens",
        type=int,
        help="maximum tokens of its reply, thinking included; default 1024",
    )


@contextlib.contextmanager
def open_judge(args: argparse.Namespace, screen) -> Iterator[Any]:
    """Open the judge of these options, None without hosts; log its metrics at the end.

    If all hosts fail, verification continues without the judge, which is logged.
    """
    from oreal_jax.verify.llm_judge import Judge, judge_metrics

    if not args.judge:
        if args.judge_model:
            raise InputError("--judge-model without --judge: where is it served?")
        if args.judge_max_tokens is not None:
            raise InputError("--judge-max-tokens without --judge: there is no judge")
        yield None
        return
    max_tokens = 1024 if args.judge_max_tokens is None else args.judge_max_tokens
    check_min(1, "--judge-max-tokens", max_tokens)
    with Judge(
        args.judge,
        args.judge_model,
        max_tokens=max_tokens,
        lost="rule",
        log=screen.log,
    ) as judge:
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


def template_var(text: str) -> tuple[str, bool | int | float | str]:
    """Parse a variable of a template and its value, such as "n=3" or "think=false"."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        message = f"{text!r}: expected e.g. enable_thinking=false"
        raise argparse.ArgumentTypeError(message)
    try:
        parsed = json.loads(value.lower())
    except ValueError:
        return name, value
    return name, parsed if isinstance(parsed, bool | int | float) else value


def load_for_generation(
    args: argparse.Namespace,
    sampling,
    *,
    stops: Sequence[str] = (),
    out: Path | None = None,
):
    """Load the model of these options, and make its engine for this `sampling`.

    Raises:
        InputError: the model cannot be used, or not with this `sampling`.
    """
    model, engine = load_engine(args, stops=stops, out=out)
    engine.check_sampling(sampling)
    return model, engine


def load_engine(
    args: argparse.Namespace, *, stops: Sequence[str] = (), out: Path | None = None
):
    """Load the model of these options, and make its engine.

    The weights are still loading when this returns. `stops` are texts that end a
    completion. Unfinished work on `out` is resumed with the date in its prompts.

    Raises:
        InputError: the model cannot be used.
    """
    from oreal_jax.evaluation.generation import unfinished_date
    from oreal_jax.loading import load_model

    check_min(1, "--rows", args.rows)
    model = load_model(
        args.model,
        step=args.step,
        system_prompt=args.system_prompt,
        chat_template=args.chat_template,
        template_vars=dict(args.template_var or ()),
        date=unfinished_date(out),
        stops=stops,
    )
    engine = model.make_engine(rows=args.rows, weights=args.weights, cache=args.cache)
    return model, engine


def make_sampling(args: argparse.Namespace, greedy: bool):
    """Return the `Sampling` of these options."""
    from oreal_jax.sampling import Sampling

    check_seed(args.seed)
    values = {name: getattr(args, name) for name in SAMPLING}
    if greedy:
        values["temperature"] = 0.0
    return Sampling(**values, logit_bias=tuple(args.logit_bias))
