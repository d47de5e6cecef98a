"""`oreal train` and `oreal sft`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from oreal_jax.cli.options import Verb, check_min, config_options


def add(verb: Verb) -> None:
    """Add both verbs."""
    for name, call, config, what in [
        (
            "train",
            train,
            "smollm2_arithmetic",
            "train with OREAL; an existing run directory is resumed",
        ),
        (
            "sft",
            sft,
            "smollm2_sft",
            "fine-tune on solutions (SFT, or RFT on a model's own correct ones)",
        ),
    ]:
        example = f"oreal {name} configs/{config}.py --set steps=20"
        parser = verb(name, call, what, example)
        config_options(parser)
        if name == "train":
            for option, field in (("question", "question"), ("answer", "gold_answer")):
                text = f"field of the prompt file with the {option} (default: {field})"
                parser.add_argument(f"--{option}", metavar="FIELD", help=text)
        parser.add_argument(
            "--run", type=Path, help="run directory (default: runs/<config name>)"
        )
        parser.add_argument(
            "--profile",
            type=int,
            default=0,
            metavar="N",
            help="trace N steps after the first for xprof, into RUN/profile",
        )
        process_options(parser)


def process_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run with several processes."""
    group = parser.add_argument_group(
        "several processes",
        "One on each host (or device), all with the same command but for --process. "
        "Without these options the variables in brackets are read; a SLURM step of "
        "several tasks needs neither.",
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="host of process 0, and a free port there (OREAL_COORDINATOR)",
    )
    group.add_argument(
        "--processes",
        metavar="N",
        help="number of processes; auto: as TPU pods, SLURM, Open MPI and Kubernetes "
        "report it (OREAL_PROCESSES)",
    )
    group.add_argument(
        "--process", metavar="I", help="number of this one, from 0 (OREAL_PROCESS)"
    )
    group.add_argument(
        "--wait",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="how long they wait for each other at the start",
    )


def train(args: argparse.Namespace) -> None:
    """Run `oreal train`."""
    from oreal_jax.config import TrainConfig
    from oreal_jax.train.loop import train_oreal

    fields = {"question": args.question, "answer": args.answer}
    changes = [f"{name}={field}" for name, field in fields.items() if field]
    args.set = [*args.set, *changes]
    _run(args, TrainConfig, train_oreal)


def sft(args: argparse.Namespace) -> None:
    """Run `oreal sft`."""
    from oreal_jax.config import SftConfig
    from oreal_jax.train.sft import train_sft

    _run(args, SftConfig, train_sft)


def _run(args: argparse.Namespace, kind: type, work: Callable) -> None:
    from oreal_jax import config_loading, distributed
    from oreal_jax.cluster import initialize_arguments
    from oreal_jax.console import Screen
    from oreal_jax.interrupts import sigterm_as_interrupt

    check_min(0, "--profile", args.profile)
    run = args.run or Path("runs") / args.config.stem
    arguments = initialize_arguments(args.coordinator, args.processes, args.process)
    with sigterm_as_interrupt(), distributed.initialized(arguments, args.wait):
        screen = Screen() if distributed.is_first() else Screen.silent()
        try:
            config = config_loading.load(args.config, kind, args.set)
            work(config, run, screen, args.profile)
        except KeyboardInterrupt:
            screen.log(f"resume with the same command; the run is in {run}")
            raise
        screen.log(f"done: {run}")
