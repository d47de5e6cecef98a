"""`oreal sample`."""

import argparse
import json
import sys
from pathlib import Path

from oreal_jax.cli.options import (
    SAMPLING,
    Verb,
    check_min,
    load_for_generation,
    make_sampling,
    model_options,
    sampling_options,
)
from oreal_jax.errors import InputError


def add(verb: Verb) -> None:
    """Add the verb."""
    parser = verb(
        "sample",
        sample,
        "complete prompts",
        'oreal sample --model runs/demo/run --prompt "What is 2 + 3?" --n 4',
    )
    model_options(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="one question")
    prompts.add_argument("--file", type=Path, help="JSON lines with a `question` each")
    parser.add_argument("--n", type=int, default=1, help="completions per prompt")
    sampling_options(parser)
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a completion before this text (or at this special token); may be "
        "repeated",
    )
    parser.add_argument("--json", action="store_true", help="JSON lines")


def sample(args: argparse.Namespace) -> None:
    """Run `oreal sample`."""
    from oreal_jax.console import Screen, escape
    from oreal_jax.data import read_questions
    from oreal_jax.files import is_text
    from oreal_jax.sampling import Completion, Request

    check_min(1, "--n", args.n)
    if args.greedy and args.temperature != SAMPLING["temperature"]:
        raise InputError("--greedy with --temperature: greedy decoding has none")
    for option, texts in (("--prompt", [args.prompt]), ("--stop", args.stop)):
        for text in texts:
            if text is not None and not is_text(text):
                raise InputError(f"{option} {text!r}: not valid Unicode")
    screen = Screen.on_stderr()
    questions = [args.prompt] if args.file is None else read_questions(args.file)
    sampling = make_sampling(args, args.greedy)
    model, engine = load_for_generation(args, sampling, stops=args.stop)
    chat = model.chat
    requests = [
        Request(chat.encode(question), sampling, key, seed=args.seed)
        for key, question in enumerate(questions)
    ]
    with screen.phase("load"):
        weights = engine.weights(model.params)
    del model  # frees the loaded weights
    rows: dict[tuple[int, int], dict] = {}

    def on_finished(request: int, sample: int, completion: Completion) -> None:
        rows[request, sample] = {
            "question": questions[request],
            "completion": chat.decode(completion.tokens),
            "tokens": len(completion.tokens),
            "finish_reason": completion.finish_reason,
            "log_prob": float(completion.log_probs.sum()),
        }

    try:
        with screen.phase("gen", total=len(requests) * args.n) as advance:
            engine.sample(
                weights,
                requests,
                args.n,
                on_progress=lambda tokens, finished: advance(finished, tokens),
                on_finished=on_finished,
            )
    finally:  # finished completions are printed even if interrupted
        on_terminal = sys.stdout.isatty()
        for number, (_, row) in enumerate(sorted(rows.items()), start=1):
            if args.json:
                print(json.dumps(row, ensure_ascii=on_terminal))
                continue
            if on_terminal and len(rows) > 1:
                print(f"--- {number} of {len(rows)}")
            print(escape(row["completion"]) if on_terminal else row["completion"])
