"""`oreal fetch`: models and data sets of the Hugging Face hub."""

import argparse
from pathlib import Path

from oreal_jax.cli.options import Verb


def add(verb: Verb) -> None:
    """Add `oreal fetch`."""
    command = verb(
        "fetch",
        fetch,
        "download a model or data set from the Hugging Face hub",
        "oreal fetch Qwen/Qwen2.5-1.5B-Instruct --output models/qwen",
    )
    command.add_argument("repository", help="its name on the hub, OWNER/NAME")
    command.add_argument("--revision", help="a branch, tag or commit")
    command.add_argument(
        "--output", type=Path, help="default: models/NAME or data/NAME"
    )


def fetch(args: argparse.Namespace) -> None:
    """Run `oreal fetch`."""
    from oreal_jax import hub
    from oreal_jax.console import Screen

    result = hub.fetch(args.repository, revision=args.revision, output=args.output)
    screen = Screen()
    for name in result.files:
        screen.log(f"{result.directory / name}")
    screen.log(f"wrote {result.directory}: {result.kind} at commit {result.commit}")
