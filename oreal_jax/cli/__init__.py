"""`oreal <verb>`: parse, call, print. What a verb does lives in the room it calls."""

import argparse
import errno
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from oreal_jax import hardware
from oreal_jax.cli import convert, data, evaluate, losses, plan, sample, train, verify
from oreal_jax.errors import Failure, InputError
from oreal_jax.interrupts import (
    INTERRUPTED,
    exit_process,
    repeat_lost_interrupts,
)


def command() -> NoReturn:
    """The script `oreal`: `main`, then the end of the process."""
    exit_process(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb. Exit codes: 0 done, 1 it cannot go on, 2 bad input,
    130 interrupted."""
    try:
        parsed = parser().parse_args(arguments)
        hardware.hide_absent_devices()
        with repeat_lost_interrupts():
            parsed.call(parsed)
    except InputError as error:
        print(f"oreal: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # who reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print("oreal: no space is left to write to", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("oreal: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Failure as error:
        print(f"oreal: {error}", file=sys.stderr)
        return 1
    return 0


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default in (None, False, [])
        return action.help if plain else super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    top = argparse.ArgumentParser(
        prog="oreal",
        description="Outcome-reward reinforcement learning for mathematical reasoning "
        "(OREAL, arXiv:2502.06781) in JAX.",
        epilog="Each verb explains itself: oreal train --help",
    )
    verbs = top.add_subparsers(required=True, metavar="VERB", title="verbs")

    def verb(
        of, name: str, call: Callable, help: str, example: str
    ) -> argparse.ArgumentParser:
        made = of.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example: {example}",
            formatter_class=_Help,
        )
        made.set_defaults(call=call)
        return made

    def group(name: str, help: str, metavar: str):
        made = verbs.add_parser(name, help=help)
        return made.add_subparsers(required=True, metavar=metavar)

    at_top = functools.partial(verb, verbs)
    for module in (train, plan, sample, evaluate):
        module.add(at_top)
    what = "clean prompts, measure pass rates, collect RFT sets"
    data.add(functools.partial(verb, group("data", what, "VERB")))
    what = "convert weights from and to Hugging Face format"
    convert.add(functools.partial(verb, group("convert", what, "DIRECTION")))
    for module in (verify, losses):
        module.add(at_top)
    return top
