"""`oreal train` and `oreal sft`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from oreal_jax.cli.options import Verb, at_least, config_options


def add(verb: Verb) -> None:
    """Adds both verbs."""
    for name, call, config, what in [
        (
            "train",
            train,
            "smollm2_arithmetic",
            "train with OREAL; an existing run directory is continued",
        ),
        (
            "sft",
            sft,
            "smollm2_sft",
            "fine-tune on solutions (SFT, or RFT on a model's own correct ones)",
        ),
    ]:
        example = f"oreal {name} configs/{config}.py --set steps=20"
        made = verb(name, call, what, example)
        config_options(made)
        made.add_argument(
            "--run", type=Path, help="run directory (default: runs/<config name>)"
        )
        made.add_argument(
            "--profile",
            type=int,
            default=0,
            metavar="N",
            help="trace N steps behind the first for xprof, into RUN/profile",
        )
        process_options(made)


def process_options(made: argparse.ArgumentParser) -> None:
    """Adds what tells a process its place among several."""
    several = made.add_argument_group(
        "several processes",
        "One on each host (or device), all with the same command but for --process. "
        "Without these options the variables in brackets are looked up; a SLURM step "
        "of several tasks needs neither.",
    )
    several.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="where process 0 runs, a free port there (OREAL_COORDINATOR)",
    )
    several.add_argument(
        "--processes",
        metavar="N",
        help="how many there are; auto: as TPU pods, SLURM, Open MPI and Kubernetes "
        "say (OREAL_PROCESSES)",
    )
    several.add_argument(
        "--process", metavar="I", help="number of this one, from 0 (OREAL_PROCESS)"
    )
    several.add_argument(
        "--wait",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="how long they wait for each other at the start",
    )


def train(parsed: argparse.Namespace) -> None:
    """`oreal train`."""
    from oreal_jax.config import TrainConfig
    from oreal_jax.train.loop import train

    _run(parsed, TrainConfig, train)


def sft(parsed: argparse.Namespace) -> None:
    """`oreal sft`."""
    from oreal_jax.config import SftConfig
    from oreal_jax.train.sft import sft

    _run(parsed, SftConfig, sft)


def _run(parsed: argparse.Namespace, kind: type, work: Callable) -> None:
    from oreal_jax import config_loading, distributed
    from oreal_jax.cluster import initialize_arguments
    from oreal_jax.console import Screen
    from oreal_jax.interrupts import sigterm_as_interrupt

    at_least(0, "--profile", parsed.profile)
    run = parsed.run or Path("runs") / parsed.config.stem
    arguments = initialize_arguments(
        parsed.coordinator, parsed.processes, parsed.process
    )
    with sigterm_as_interrupt(), distributed.initialized(arguments, parsed.wait):
        screen = Screen() if distributed.is_first() else Screen.silent()
        try:
            loaded = config_loading.load(parsed.config, kind, parsed.set)
            work(loaded, run, screen, parsed.profile)
        except KeyboardInterrupt:
            screen.say(f"go on with the same command; the run is in {run}")
            raise
        screen.say(f"done: {run}")
