"""`oreal <verb>`: the parser of all verbs, and exit codes."""

import argparse
import errno
import functools
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import NoReturn

from oreal_jax import hardware
from oreal_jax.cli import (
    completion,
    convert,
    data,
    evaluate,
    fetch,
    losses,
    plan,
    report,
    runs,
    sample,
    serve,
    train,
    verify,
)
from oreal_jax.errors import Failure, InputError
from oreal_jax.interrupts import (
    INTERRUPTED,
    exit_process,
    repeat_lost_interrupts,
)

# Causes are outside the program, and the message names the file.
FILE_ERRORS = (errno.ENAMETOOLONG, errno.EACCES, errno.EISDIR, errno.ENOTDIR)
FILE_ERRORS += (errno.ELOOP, errno.EROFS, errno.EBUSY)


def command() -> NoReturn:
    """Run the script `oreal`, then end the process."""
    exit_process(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code.

    0: success, 1: failure, 2: invalid input, 130: interrupted.
    """
    try:
        args = _parse(arguments)
        hardware.hide_absent_devices()
        with repeat_lost_interrupts():
            args.call(args)
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _fail("no space left on the device", 1)
        if error.errno not in FILE_ERRORS or not error.filename:
            raise
        return _fail(f"{error.filename}: {str(error.strerror).lower()}", 2)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except (InputError, Failure) as error:
        return _fail(str(error), 2 if isinstance(error, InputError) else 1)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    args, unknown = parser().parse_known_args(arguments)
    if unknown:
        # argparse would print the usage of `oreal`, not that of the verb.
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def _fail(message: str, code: int) -> int:
    print(f"oreal: {message}", file=sys.stderr)
    return code


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults other than None, False and empty values."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, "", []):
            return action.help
        return super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs and their options."""
    top = argparse.ArgumentParser(
        prog="oreal",
        description="Outcome-reward reinforcement learning for mathematical reasoning "
        "(OREAL, arXiv:2502.06781) in JAX.",
        epilog="Each verb explains itself: oreal train --help",
    )
    version = f"oreal-jax {metadata.version('oreal-jax')}"
    top.add_argument("--version", action="version", version=version)
    verbs = top.add_subparsers(required=True, metavar="VERB", title="verbs")

    def verb(
        subparsers, name: str, call: Callable, help: str, example: str
    ) -> argparse.ArgumentParser:
        parser = subparsers.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example: {example}",
            formatter_class=_Help,
        )
        parser.set_defaults(call=call, parser=parser)
        return parser

    def group(name: str, metavar: str, help: str) -> Callable:
        nested = verbs.add_parser(name, help=help)
        return functools.partial(
            verb, nested.add_subparsers(required=True, metavar=metavar)
        )

    for module in (train, runs, plan, sample, evaluate, report):
        module.add(functools.partial(verb, verbs))
    what = "clean prompts, measure pass rates, collect RFT sets"
    data.add(group("data", "VERB", what))
    what = "convert weights from and to Hugging Face format"
    convert.add(group("convert", "DIRECTION", what))
    for module in (verify, losses, serve):
        module.add(functools.partial(verb, verbs))
    fetch.add(functools.partial(verb, verbs))
    completion.add(functools.partial(verb, verbs), top)
    return top
