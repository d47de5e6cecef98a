"""`oreal verify`."""

import argparse
import json
import os
from pathlib import Path

from oreal_jax.cli.options import Verb
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
    made.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="URL",
        help="an OpenAI-compatible API (.../v1), asked where the rule does not say "
        "right; may be repeated",
    )
    made.add_argument("--judge-model", default="", help="the model to ask there")
    made.add_argument("--json", action="store_true", help="JSON lines")


def verify(parsed: argparse.Namespace) -> None:
    """`oreal verify`."""
    from oreal_jax.console import Screen
    from oreal_jax.data import read_judgements
    from oreal_jax.verify import Pool

    given = [x is not None for x in (parsed.gold, parsed.answer, parsed.file)]
    if given not in ([True, True, False], [False, False, True]):
        raise BadInput("verify takes either --gold and --answer, or --file")
    pairs = [(str(parsed.answer), str(parsed.gold))]
    if parsed.file:
        pairs = read_judgements(parsed.file)
    screen = Screen.on_stderr()
    with (
        Pool(min(parsed.workers, len(pairs)), parsed.deadline) as pool,
        screen.phase("verify", total=len(pairs)) as advance,
    ):
        verdicts = pool.verdicts(pairs, advance)
    if parsed.judge:
        verdicts = _second_opinions(parsed, screen, pairs, verdicts)
    for verdict in verdicts:
        row = {"verdict": verdict.outcome, "reason": verdict.reason, "by": verdict.by}
        text = f"{verdict.outcome}: {verdict.reason} (by {verdict.by})"
        print(json.dumps(row, ensure_ascii=False) if parsed.json else text)


def _second_opinions(parsed: argparse.Namespace, screen, pairs, verdicts) -> list:
    from oreal_jax.verify.llm_judge import Case, Judge, judge_metrics

    # Without the question, which `verify` is not given.
    cases = [
        Case("(not given)", g, c, v) for (c, g), v in zip(pairs, verdicts, strict=True)
    ]
    with Judge(parsed.judge, parsed.judge_model, lost="rule", say=screen.say) as judge:
        judged = judge.verdicts(cases)
        counts = judge_metrics([judge.take_counts()])
    told = {name: n for name, n in counts.items() if n}
    screen.say("  ".join(f"{name} {n:g}" for name, n in told.items()))
    return judged
