"""`oreal verify`."""

import argparse
import json
import os
from pathlib import Path

from oreal_jax.cli.options import Verb, judge_of, judge_options
from oreal_jax.errors import BadInput


def add(verb: Verb) -> None:
    """Adds the verb."""
    made = verb(
        "verify",
        verify,
        "judge answers by rule: right, wrong or undecided",
        "oreal verify --gold '\\frac{1}{2}' --answer 'so it is \\boxed{0.5}'",
    )
    made.add_argument("--gold", help="the gold answer")
    made.add_argument("--answer", help="the completion to judge")
    made.add_argument(
        "--file", type=Path, help="JSON lines with `gold` and `prediction`"
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
    from oreal_jax.verify import Pool
    from oreal_jax.verify.llm_judge import Case

    given = [x is not None for x in (parsed.gold, parsed.answer, parsed.file)]
    if given not in ([True, True, False], [False, False, True]):
        raise BadInput("verify takes either --gold and --answer, or --file")
    if parsed.question and not (parsed.judge and parsed.answer is not None):
        raise BadInput("--question goes with --answer and --judge")
    pairs = [(str(parsed.answer), str(parsed.gold))]
    if parsed.file:
        pairs = read_judgements(parsed.file)
    screen = Screen.on_stderr()
    with (
        judge_of(parsed, screen) as judge,
        Pool(min(parsed.workers, len(pairs)), parsed.deadline) as pool,
        screen.phase("verify", total=len(pairs)) as advance,
    ):
        verdicts = pool.verdicts(pairs, advance)
        if judge:
            question = parsed.question or "(not given)"
            verdicts = judge.verdicts(
                [
                    Case(question, gold, completion, verdict)
                    for (completion, gold), verdict in zip(pairs, verdicts, strict=True)
                ]
            )
    for verdict in verdicts:
        row = {"verdict": verdict.outcome, "reason": verdict.reason, "by": verdict.by}
        text = f"{verdict.outcome}: {verdict.reason} (by {verdict.by})"
        print(json.dumps(row, ensure_ascii=False) if parsed.json else text)
