"""`oreal completion`: scripts that complete verbs, options and files in a shell."""

import argparse
from pathlib import Path

import shtab

from oreal_jax.cli.options import Verb


def add(verb: Verb, root: argparse.ArgumentParser) -> None:
    """Add `oreal completion` for the verbs of `root`."""
    command = verb(
        "completion",
        completion,
        "print a script that completes verbs, options and files in a shell",
        'eval "$(oreal completion bash)"',
    )
    command.add_argument("shell", choices=["bash", "zsh", "fish"])
    command.set_defaults(root=root)


def completion(args: argparse.Namespace) -> None:
    """Run `oreal completion`."""
    _complete_files(args.root)
    print(shtab.complete(args.root, args.shell))


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Complete file names for options and arguments that take a file."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                _complete_files(verb)
        elif action.type is Path or action.dest in ("model", "data"):
            action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
