"""`oreal plan`."""

import argparse
import json

from oreal_jax.cli.options import Verb, at_least, config_options
from oreal_jax.errors import Failure


def add(verb: Verb) -> None:
    """Adds the verb."""
    made = verb(
        "plan",
        plan,
        "compile a run for a TPU topology, without one: does it fit, what limits it",
        "oreal plan configs/oreal_7b.py --topology v5p:2x2x4 --topology v5e:8x8",
    )
    config_options(made)
    made.add_argument(
        "--topology",
        action="append",
        required=True,
        metavar="NAME",
        help="e.g. v5e:8x8, v5p:2x2x4, v6e:4x8; by formula alone, without compiling: "
        "a100:16, h100:8, h200:8; may be repeated",
    )
    made.add_argument(
        "--mean-tokens",
        type=int,
        help="tokens of a completion on average (default: half of the most)",
    )
    made.add_argument("--json", action="store_true", help="one JSON object a topology")


def plan(parsed: argparse.Namespace) -> None:
    """`oreal plan`."""
    from oreal_jax.config import TrainConfig
    from oreal_jax.config_loading import load
    from oreal_jax.console import Screen
    from oreal_jax.plan import plan
    from oreal_jax.plan.show import show, why

    chosen = load(parsed.config, TrainConfig, parsed.set)
    mean_tokens = parsed.mean_tokens
    if mean_tokens is None:
        mean_tokens = max(1, chosen.sampling.max_tokens // 2)
    at_least(1, "--mean-tokens", mean_tokens)
    screen = Screen.on_stderr()
    too_large = []
    for topology in parsed.topology:
        with screen.phase("compile", label=f"{topology}: ") as advance:
            made = plan(chosen, topology, mean_tokens, lambda name: advance())
        if parsed.json:
            print(json.dumps(made.as_json()))
        else:
            show(made, Screen().console)
        if not made.fits:
            too_large.append(why(made))
    if too_large:
        raise Failure("; ".join(too_large))
