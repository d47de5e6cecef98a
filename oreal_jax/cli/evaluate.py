"""`oreal eval` and `oreal compare`."""

import argparse
import json
import os
from pathlib import Path

from oreal_jax.cli.options import (
    GenerationModel,
    Verb,
    check_min,
    check_seed,
    folder,
    generation_defaults,
    generation_options,
    judge_options,
    make_sampling,
    model_options,
    open_judge,
    sampling_options,
)
from oreal_jax.errors import InputError
from oreal_jax.files import check_apart, check_writable, write_lines, write_text


def add(verb: Verb) -> None:
    """Adds both verbs."""
    made = verb(
        "eval",
        evaluate,
        "measure pass@1, avg@k, pass@k and maj@k on questions with gold answers",
        "oreal eval --model runs/demo/run --data heldout.jsonl --data math500 --k 8",
    )
    model_options(made)
    made.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="SET",
        help="a jsonl or parquet file, a data set, or a preset (another word lists "
        "them); may be repeated",
    )
    folder(made)
    made.add_argument(
        "--k", type=int, default=1, help="samples a problem; 1 is greedy, more average"
    )
    sampling_options(made, greedy=False)
    made.add_argument(
        "--greedy", action="store_true", help="measure greedy pass@1 too, beside k > 1"
    )
    made.add_argument(
        "--by",
        action="append",
        default=[],
        metavar="FIELD",
        help="break down by a field of the rows, as subject or level; may be repeated",
    )
    judge_options(made)
    made.add_argument("--limit", type=int, help="only the first problems of each set")
    made.add_argument("--items", type=Path, help="write every item here (.jsonl)")
    made.add_argument("--json", type=Path, help="write the report and every item here")

    made = verb(
        "compare",
        compare,
        "compare two evaluations of the same problems with a paired test",
        "oreal compare before.jsonl after.jsonl",
    )
    for name in ("first", "second"):
        made.add_argument(name, type=Path, help="what `oreal eval --items` wrote")
    made.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    made.add_argument("--json", type=Path, help="write all numbers here")


def evaluate(parsed: argparse.Namespace) -> None:
    """`oreal eval`."""
    from oreal_jax.console import Screen
    from oreal_jax.evaluation import kept_beside, load_sets, run
    from oreal_jax.evaluation.attempts import drawing
    from oreal_jax.metrics import compilations
    from oreal_jax.verify import Pool

    screen = Screen.on_stderr()
    check_min(1, "--k", parsed.k)
    if parsed.greedy and parsed.k == 1:
        raise InputError("--greedy with --k 1: one sample is greedy already")
    check_apart({"--items": parsed.items, "--json": parsed.json})
    if parsed.items and parsed.items.suffix not in (".jsonl", ".json"):
        raise InputError(f"--items {parsed.items}: expected a .jsonl file")
    for path in (parsed.items, parsed.json):
        if path:
            check_writable(path)
    if parsed.k == 1 and parsed.temperature != generation_defaults()["temperature"]:
        raise InputError("--temperature with --k 1: one sample is greedy")
    sets = load_sets(parsed.data, parsed.folder)
    if parsed.limit is not None:
        check_min(1, "--limit", parsed.limit)
        sets = [each._replace(problems=each.problems[: parsed.limit]) for each in sets]
    run.check_fields(sets, parsed.by)
    sampling = make_sampling(parsed, parsed.k == 1)
    plan = run.Plan(None, sampling, parsed.k)
    if parsed.k == 1:
        plan = run.Plan(sampling, None, 0)
    elif parsed.greedy:
        plan = plan._replace(greedy=make_sampling(parsed, True))
    opened = GenerationModel(parsed, sampling)
    problems = [problem for each in sets for problem in each.problems]
    work = drawing(opened.source, opened.chat, problems, generation_options(parsed))
    out = parsed.items or parsed.json
    with (
        open_judge(parsed, screen) as second,
        kept_beside(out, work, screen.say) as finished,
    ):
        with screen.phase("load"):
            params = opened.load()
        with Pool(os.cpu_count() or 1) as pool:
            reports = run.measure(
                plan,
                opened.engine,
                params,
                opened.chat,
                pool,
                sets,
                by=parsed.by,
                seed=parsed.seed,
                finished=finished,
                second=second,
                screen=screen,
            )
        performance = compilations.take()
        if parsed.items:
            write_lines(parsed.items, run.items(reports))
        if parsed.json:
            document = run.as_json(parsed.model, reports) | performance
            text = json.dumps(document, ensure_ascii=False, indent=1)
            write_text(parsed.json, text + "\n")
    run.show(parsed.model, reports)
    screen.say("  ".join(f"{name} {value:.3g}" for name, value in performance.items()))


def compare(parsed: argparse.Namespace) -> None:
    """`oreal compare`."""
    from oreal_jax.evaluation import compare, tables

    check_seed(parsed.seed)
    if parsed.json:
        check_apart(
            {"--json": parsed.json}, {"an input": [parsed.first, parsed.second]}
        )
        check_writable(parsed.json)
    found = compare(parsed.first, parsed.second, parsed.seed)
    if parsed.json:
        text = json.dumps([one.as_json() for one in found], indent=1)
        write_text(parsed.json, text + "\n")
    tables.say(tables.compared(str(parsed.first), str(parsed.second), found))
