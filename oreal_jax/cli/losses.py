"""`oreal losses`."""

import argparse
import json
from pathlib import Path

from oreal_jax.cli.options import Verb
from oreal_jax.errors import InputError
from oreal_jax.files import write_text


def add(verb: Verb) -> None:
    """Add the verb."""
    parser = verb(
        "losses",
        losses,
        "compare losses on saved trajectories; needs no model",
        "oreal losses runs/demo/run/trajectories/step_000005.jsonl --loss released "
        "--loss grpo --loss configs/my_loss.py --picture losses.png",
    )
    parser.add_argument(
        "trajectories",
        type=Path,
        nargs="+",
        help="files of a run's trajectories/, or that directory; together one batch",
    )
    parser.add_argument(
        "--loss",
        action="append",
        metavar="NAME|CONFIG.py",
        help="a preset (an unknown name lists them) or a config file with a loss of "
        "your own; may be repeated (default: released, paper, grpo)",
    )
    parser.add_argument(
        "--trajectory",
        action="append",
        default=[],
        metavar="STEP/ID/SAMPLE",
        help="a completion to plot; may be repeated (default: one of each outcome)",
    )
    parser.add_argument("--picture", type=Path, help="plot coefficients to this file")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")


def losses(args: argparse.Namespace) -> None:
    """Run `oreal losses`."""
    from oreal_jax import loss_lab, program_cache
    from oreal_jax.console import Screen

    selected = {}
    for value in args.loss or ["released", "paper", "grpo"]:
        name = Path(value).stem
        if name in selected:
            raise InputError(f"--loss {value}: there is a {name} already")
        selected[name] = loss_lab.load_loss(value)
    trajectories = loss_lab.load_trajectories(args.trajectories)
    indices = loss_lab.select(trajectories, args.trajectory)
    program_cache.enable()
    screen = Screen()
    results = {}
    with screen.phase("evaluate", total=len(selected)) as advance:
        for name, loss in selected.items():
            results[name] = loss_lab.evaluate_loss(loss, trajectories)
            advance()
    for table in loss_lab.make_tables(results):
        screen.console.print(table)
    if args.json:
        numbers = loss_lab.to_json(results, trajectories)
        write_text(args.json, json.dumps(numbers, indent=1) + "\n")
    if args.picture:
        loss_lab.plot(results, trajectories, indices, args.picture)
