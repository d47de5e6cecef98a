"""`oreal verify`."""

import argparse
import json
import math
import os
from pathlib import Path

from oreal_jax.cli.options import Verb, check_min, judge_options, open_judge
from oreal_jax.errors import InputError

TOGETHER = 256  # answers judged before their verdicts are said


def add(verb: Verb) -> None:
    """Adds the verb."""
    made = verb(
        "verify",
        verify,
        "judge answers by rule: correct, incorrect or undecided",
        "oreal verify --gold '\\frac{1}{2}' --answer 'so it is \\boxed{0.5}'",
    )
    made.add_argument("--gold", help="the gold answer")
    made.add_argument("--answer", help="the completion to judge")
    made.add_argument(
        "--file",
        type=Path,
        help="JSON lines with `gold`, `prediction` and, for the judge, `question`",
    )
    made.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    made.add_argument("--deadline", type=float, default=5.0, help="seconds an answer")
    judge_options(made)
    made.add_argument("--question", help="of --answer, for the judge to see")
    made.add_argument("--json", action="store_true", help="JSON lines")


def verify(parsed: argparse.Namespace) -> None:
    """`oreal verify`."""
    from oreal_jax.console import Screen
    from oreal_jax.data import read_judgements
    from oreal_jax.data.prompts import Prediction
    from oreal_jax.verify import Pool
    from oreal_jax.verify.llm_judge import Case

    given = [x is not None for x in (parsed.gold, parsed.answer, parsed.file)]
    if given not in ([True, True, False], [False, False, True]):
        raise InputError("verify takes either --gold and --answer, or --file")
    if parsed.question and not (parsed.judge and parsed.answer is not None):
        raise InputError("--question goes with --answer and --judge")
    check_min(1, "--workers", parsed.workers)
    if not 0 < parsed.deadline < math.inf:
        raise InputError(f"--deadline {parsed.deadline}: must be above 0 and finite")
    asked = [Prediction(str(parsed.answer), str(parsed.gold), parsed.question)]
    if parsed.file:
        asked = read_judgements(parsed.file)
    screen = Screen.on_stderr()
    with (
        open_judge(parsed, screen) as judge,
        Pool(min(parsed.workers, len(asked)), parsed.deadline) as pool,
        screen.phase("verify", total=len(asked)) as advance,
    ):
        for first in range(0, len(asked), TOGETHER):
            some = asked[first : first + TOGETHER]
            verdicts = pool.verdicts([(a.prediction, a.gold) for a in some], advance)
            if judge:
                verdicts = judge.verdicts(
                    [
                        Case(a.question or "(not given)", a.gold, a.prediction, verdict)
                        for a, verdict in zip(some, verdicts, strict=True)
                    ]
                )
            for verdict in verdicts:
                row = {"verdict": verdict.outcome, "reason": verdict.reason}
                text = f"{verdict.outcome}: {verdict.reason} (by {verdict.by})"
                whole = json.dumps(row | {"by": verdict.by}, ensure_ascii=False)
                print(whole if parsed.json else text, flush=True)
