"""`oreal plan`."""

import argparse
import json

from oreal_jax.cli.options import Verb, check_min, config_options
from oreal_jax.errors import Failure


def add(verb: Verb) -> None:
    """Add the verb."""
    parser = verb(
        "plan",
        plan,
        "compile a run for a TPU topology, without TPUs: does it fit, what limits it",
        "oreal plan configs/oreal_7b.py --topology v5p:2x2x4 --topology v5e:8x8",
    )
    config_options(parser)
    parser.add_argument(
        "--topology",
        action="append",
        required=True,
        metavar="NAME",
        help="e.g. v5e:8x8, v5p:2x2x4, v6e:4x8; arrays and bounds alone, without "
        "compiling: a100:16, h100:8, h200:8; may be repeated",
    )
    parser.add_argument(
        "--mean-tokens",
        type=int,
        help="mean tokens of a completion (default: half of the maximum)",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per topology"
    )


def plan(args: argparse.Namespace) -> None:
    """Run `oreal plan`."""
    from oreal_jax.config import TrainConfig
    from oreal_jax.config_loading import load
    from oreal_jax.console import Screen
    from oreal_jax.plan import make_plan
    from oreal_jax.plan.show import conclusion, show

    config = load(args.config, TrainConfig, args.set)
    mean_tokens = args.mean_tokens
    if mean_tokens is None:
        mean_tokens = max(1, config.sampling.max_tokens // 2)
    check_min(1, "--mean-tokens", mean_tokens)
    screen = Screen.on_stderr()
    too_large = []
    for topology in args.topology:
        with screen.phase("compile", label=f"{topology}: ") as advance:
            result = make_plan(config, topology, mean_tokens, lambda name: advance())
        if args.json:
            print(json.dumps(result.as_json()))
        else:
            show(result, Screen().console)
        if result.fits is False:
            too_large.append(conclusion(result))
    if too_large:
        raise Failure("; ".join(too_large))
