"""`oreal sample`."""

import argparse
import json
from pathlib import Path

from oreal_jax.cli.options import (
    Opened,
    Verb,
    at_least,
    drawing_defaults,
    model_options,
    sampling_of,
    sampling_options,
)
from oreal_jax.errors import InputError


def add(verb: Verb) -> None:
    """Adds the verb."""
    made = verb(
        "sample",
        sample,
        "complete prompts",
        'oreal sample --model runs/demo/run --prompt "What is 2 + 3?" --n 4',
    )
    model_options(made)
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="one question")
    what.add_argument("--file", type=Path, help="JSON lines with a `question` each")
    made.add_argument("--n", type=int, default=1, help="completions per prompt")
    sampling_options(made)
    made.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a completion before this text (or at this special token); may be "
        "repeated",
    )
    made.add_argument("--json", action="store_true", help="JSON lines")


def sample(parsed: argparse.Namespace) -> None:
    """`oreal sample`."""
    from oreal_jax.console import Screen
    from oreal_jax.data import read_questions
    from oreal_jax.files import is_text
    from oreal_jax.sampling import Completion, Request

    at_least(1, "--n", parsed.n)
    if parsed.greedy and parsed.temperature != drawing_defaults()["temperature"]:
        raise InputError(
            "--greedy with --temperature: the likeliest has no temperature"
        )
    for option, texts in (("--prompt", [parsed.prompt]), ("--stop", parsed.stop)):
        for text in texts:
            if text is not None and not is_text(text):
                raise InputError(f"{option} {text!r}: not valid Unicode")
    screen = Screen.on_stderr()
    questions = [parsed.prompt] if parsed.file is None else read_questions(parsed.file)
    opened = Opened(parsed, sampling_of(parsed, parsed.greedy), parsed.stop)
    requests = [
        Request(opened.chat.encode(q), opened.sampling, i, seed=parsed.seed)
        for i, q in enumerate(questions)
    ]
    with screen.phase("load"):
        weights = opened.engine.weights(opened.load())
    rows: dict[tuple[int, int], dict] = {}

    def finished(request: int, sample: int, completion: Completion) -> None:
        rows[request, sample] = {
            "question": questions[request],
            "completion": opened.chat.decode(completion.tokens),
            "tokens": len(completion.tokens),
            "finish_reason": completion.finish_reason,
            "log_prob": float(completion.log_probs.sum()),
        }

    try:
        with screen.phase("gen", total=len(requests) * parsed.n) as advance:
            opened.engine.sample(
                weights,
                requests,
                parsed.n,
                on_progress=lambda tokens, finished: advance(finished, tokens),
                on_finished=finished,
            )
    finally:  # interrupted or not: what is finished is said, in order
        for _, row in sorted(rows.items()):
            text = json.dumps(row, ensure_ascii=False)
            print(text if parsed.json else row["completion"])
