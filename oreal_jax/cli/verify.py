"""`oreal verify`."""

import argparse
import json
import math
import os
from pathlib import Path

from oreal_jax.cli.options import (
    Verb,
    check_min,
    judge_options,
    open_judge,
    pool_settings,
    verifier_options,
)
from oreal_jax.errors import InputError

BATCH = 256  # answers that are judged before their verdicts are printed


def add(verb: Verb) -> None:
    """Add the verb."""
    parser = verb(
        "verify",
        verify,
        "judge answers by rule: correct, incorrect or undecided",
        "oreal verify --gold '\\frac{1}{2}' --answer 'so it is \\boxed{0.5}'",
    )
    parser.add_argument("--gold", help="the gold answer")
    parser.add_argument("--answer", help="the completion to judge")
    parser.add_argument(
        "--file",
        type=Path,
        help="JSON lines with `gold`, `prediction` and, for the judge, `question`; the "
        "verifiers of --config read all fields",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--deadline",
        type=float,
        help="seconds per answer (default: the config's, or 5)",
    )
    verifier_options(parser)
    judge_options(parser)
    parser.add_argument(
        "--question", help="question of --answer, for --judge or --config"
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines")


def verify(args: argparse.Namespace) -> None:
    """Run `oreal verify`."""
    from oreal_jax.console import Screen
    from oreal_jax.data import read_judgements
    from oreal_jax.data.prompts import Prediction
    from oreal_jax.verify import Candidate, Pool
    from oreal_jax.verify.completions import verify_completions

    present = [x is not None for x in (args.gold, args.answer, args.file)]
    if present not in ([True, True, False], [False, False, True]):
        raise InputError("verify takes either --gold and --answer, or --file")
    has_reader = args.judge or args.config
    if args.question and not (has_reader and args.answer is not None):
        raise InputError("--question requires --answer, and --judge or --config")
    check_min(1, "--workers", args.workers)
    if args.deadline is not None and not 0 < args.deadline < math.inf:
        raise InputError(f"--deadline {args.deadline}: must be above 0 and finite")
    deadline, *verifiers = pool_settings(args) or (5.0,)
    if args.deadline is not None:
        deadline = args.deadline
    prompt = {"question": args.question} if args.question else {}
    predictions = [Prediction(str(args.answer), str(args.gold), args.question, prompt)]
    if args.file:
        predictions = read_judgements(args.file)
    candidates = [
        Candidate(
            p.question or "(not given)",
            p.gold,
            p.prediction,
            # Equal answers are judged once, so the rule does not get the other fields.
            prompt=p.prompt if args.config else None,
        )
        for p in predictions
    ]
    screen = Screen.on_stderr()
    with (
        open_judge(args, screen) as judge,
        Pool(min(args.workers, len(candidates)), deadline, *verifiers) as pool,
        screen.phase("verify", total=len(candidates)) as advance,
    ):
        for start in range(0, len(candidates), BATCH):
            batch = candidates[start : start + BATCH]
            for verdict in verify_completions(batch, pool, judge, advance):
                outcome, reason, by = verdict.outcome, verdict.reason, verdict.by
                row = {"verdict": outcome, "reason": reason, "by": by}
                text = f"{outcome}: {reason} (by {by})"
                line = json.dumps(row, ensure_ascii=False) if args.json else text
                print(line, flush=True)
