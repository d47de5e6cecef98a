"""`oreal runs`."""

import argparse
import json
from pathlib import Path

from oreal_jax.cli.options import Verb


def add(verb: Verb) -> None:
    """Add `oreal runs`."""
    parser = verb(
        "runs",
        runs,
        "list runs with their state, finished steps, last score and age",
        "oreal runs runs",
    )
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path("runs"),
        help="a folder that is searched for run directories, with its subfolders",
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines")


def runs(args: argparse.Namespace) -> None:
    """Run `oreal runs`."""
    from rich.markup import escape

    from oreal_jax.console import Screen, make_table, time_text
    from oreal_jax.train.runs import age, summarize_runs

    summaries = summarize_runs(args.folder)
    if args.json:
        for each in summaries:
            print(json.dumps(each._asdict()))
        return
    rows = [
        [
            escape(each.path),
            each.method,
            f"{each.state}: {escape(each.reason)}" if each.reason else each.state,
            f"{each.step}/{each.steps}" if each.steps else f"{each.step}",
            "" if each.score is None else f"{each.score:.1%} ({each.score_step})",
            time_text(age(each)),
        ]
        for each in summaries
    ]
    columns = ("run", "verb", "state", "steps", "score (steps)", "age")
    Screen().console.print(make_table(columns, rows, names=3))
