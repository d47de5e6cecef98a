"""`oreal losses`."""

import argparse
import json
from pathlib import Path

from oreal_jax.cli.options import Verb
from oreal_jax.errors import InputError
from oreal_jax.files import write_text


def add(verb: Verb) -> None:
    """Adds the verb."""
    made = verb(
        "losses",
        losses,
        "compare losses on saved trajectories; needs no model",
        "oreal losses runs/demo/run/trajectories/step_000005.jsonl --loss released "
        "--loss grpo --loss configs/my_loss.py --picture losses.png",
    )
    made.add_argument(
        "trajectories",
        type=Path,
        nargs="+",
        help="files of a run's trajectories/, or that folder; together one batch",
    )
    made.add_argument(
        "--loss",
        action="append",
        metavar="NAME|CONFIG.py",
        help="a preset (another word lists them all) or a config file with a loss of "
        "your own; may be repeated (default: released, paper, grpo)",
    )
    made.add_argument(
        "--trajectory",
        action="append",
        default=[],
        metavar="STEP/ID/SAMPLE",
        help="a completion to plot; may be repeated (default: one of each outcome)",
    )
    made.add_argument("--picture", type=Path, help="draw coefficients into this file")
    made.add_argument("--json", type=Path, help="write all numbers here")


def losses(parsed: argparse.Namespace) -> None:
    """`oreal losses`."""
    from oreal_jax import loss_lab, program_cache
    from oreal_jax.console import Screen

    screen = Screen()
    names = parsed.loss or ["released", "paper", "grpo"]
    chosen = {}
    for name in names:
        if Path(name).stem in chosen:
            raise InputError(f"--loss {name}: there is a {Path(name).stem} already")
        chosen[Path(name).stem] = loss_lab.load_loss(name)
    recorded = loss_lab.read(parsed.trajectories)
    places = loss_lab.choose(recorded, parsed.trajectory)
    program_cache.enable()
    with screen.phase("examine", total=len(chosen)) as advance:
        examined = {}
        for name, loss in chosen.items():
            examined[name] = loss_lab.examine(loss, recorded)
            advance()
    for table in loss_lab.tables(examined):
        screen.console.print(table)
    if parsed.json:
        text = json.dumps(loss_lab.as_json(examined, recorded), indent=1)
        write_text(parsed.json, text + "\n")
    if parsed.picture:
        loss_lab.draw(examined, recorded, places, parsed.picture)
