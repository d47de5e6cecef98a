"""`oreal report` and `oreal show`."""

import argparse
from pathlib import Path

from oreal_jax.cli.options import Verb, check_min
from oreal_jax.errors import InputError
from oreal_jax.files import check_apart, check_writable, write_text

OUTCOMES = ("correct", "incorrect", "undecided")


def add(verb: Verb) -> None:
    """Add `oreal report` and `oreal show`."""
    parser = verb(
        "report",
        report,
        "write an HTML page: curves, warnings, evaluations, trajectories",
        "oreal report runs/demo/run --output report.html",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory")
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), help="write the page here"
    )
    parser.add_argument(
        "--items",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="add an evaluation: a file of `oreal eval --items`; may be repeated",
    )
    parser.add_argument(
        "--step",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="only trajectories of this step, counted from 0; may be repeated",
    )
    parser.add_argument(
        "--max-size",
        type=float,
        default=10.0,
        metavar="MB",
        help="maximum size of the page; completions that do not fit are omitted",
    )

    parser = verb(
        "show",
        show,
        "show a run in the terminal: curves, warnings, evaluations, completions",
        "oreal show runs/demo/run --outcome incorrect --n 4",
    )
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="show the curve of this metric, not the default ones; may be repeated",
    )
    parser.add_argument(
        "--step", type=int, help="step of the completions (default: the last one)"
    )
    parser.add_argument(
        "--outcome", choices=OUTCOMES, help="show completions with this outcome only"
    )
    parser.add_argument(
        "--n", type=int, default=6, help="maximum number of completions"
    )


def report(args: argparse.Namespace) -> None:
    """Run `oreal report`."""
    from oreal_jax.console import Screen
    from oreal_jax.report.evaluations import evaluate_items
    from oreal_jax.report.page import make_report
    from oreal_jax.report.runs import open_run, select_steps

    if not args.max_size > 0:
        raise InputError(f"--max-size {args.max_size:g}: must be above 0")
    check_apart({"--output": args.output}, {"--items": args.items})
    check_writable(args.output)
    runs = [select_steps(open_run(name), args.step) for name in args.runs]
    items = [each for path in args.items for each in evaluate_items(path)]
    screen = Screen()
    with screen.phase("read", total=sum(len(run.files) for run in runs)) as advance:
        page = make_report(runs, items, int(args.max_size * 1e6), advance)
    write_text(args.output, page.html)
    screen.log(
        f"{args.output}: {len(page.html.encode()) / 1e6:.1f} MB, "
        f"{page.contained} of {page.total} completions with their text"
    )


def show(args: argparse.Namespace) -> None:
    """Run `oreal show`."""
    from oreal_jax.console import Screen
    from oreal_jax.report.runs import open_run, select_steps
    from oreal_jax.report.show import show_run

    check_min(0, "--n", args.n)
    run = open_run(args.run)
    select_steps(run, [] if args.step is None else [args.step])
    console = Screen().console
    for part in show_run(run, args.metric, args.step, args.outcome, args.n):
        console.print(part)
