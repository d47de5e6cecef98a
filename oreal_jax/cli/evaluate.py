"""`oreal eval` and `oreal compare`."""

import argparse
import json
import os
from pathlib import Path

from oreal_jax.cli.options import (
    RULE,
    Verb,
    check_min,
    check_seed,
    folder,
    generation_defaults,
    generation_options,
    judge_options,
    load_for_generation,
    log_verifiers,
    make_sampling,
    model_options,
    open_judge,
    pool_settings,
    sampling_options,
    verifier_options,
)
from oreal_jax.errors import InputError
from oreal_jax.files import check_apart, check_writable, write_lines, write_text


def add(verb: Verb) -> None:
    """Add both verbs."""
    parser = verb(
        "eval",
        evaluate,
        "measure pass@1, avg@k, pass@k and maj@k on questions with gold answers",
        "oreal eval --model runs/demo/run --data heldout.jsonl --data math500 --k 8",
    )
    model_options(parser)
    parser.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="SET",
        help="a jsonl or parquet file, a data set, or a preset (an unknown name "
        "lists them); may be repeated",
    )
    folder(parser)
    parser.add_argument(
        "--k",
        type=int,
        default=1,
        help="samples per problem; 1 is greedy",
    )
    sampling_options(parser, greedy=False)
    parser.add_argument(
        "--greedy", action="store_true", help="measure greedy pass@1, too, with k > 1"
    )
    parser.add_argument(
        "--by",
        action="append",
        default=[],
        metavar="FIELD",
        help="break down by a field of the rows, as subject or level; may be repeated",
    )
    verifier_options(parser)
    judge_options(parser)
    parser.add_argument("--limit", type=int, help="only the first problems of each set")
    parser.add_argument("--items", type=Path, help="write all items here (.jsonl)")
    parser.add_argument("--json", type=Path, help="write the report and all items here")

    parser = verb(
        "compare",
        compare,
        "compare two evaluations of the same problems with a paired test",
        "oreal compare before.jsonl after.jsonl",
    )
    for name in ("first", "second"):
        parser.add_argument(name, type=Path, help="a file of `oreal eval --items`")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument(
        "--ignore-settings",
        action="store_true",
        help="compare evaluations although their settings differ, as in --max-tokens",
    )
    parser.add_argument("--json", type=Path, help="write all numbers here")


def evaluate(args: argparse.Namespace) -> None:
    """Run `oreal eval`."""
    from oreal_jax import config as configuration
    from oreal_jax.console import Screen
    from oreal_jax.evaluation import Evaluator, load_sets
    from oreal_jax.evaluation.compare import check_items_overwritable
    from oreal_jax.evaluation.evaluator import check_fields
    from oreal_jax.evaluation.generation import generation_settings, resumable
    from oreal_jax.evaluation.report import as_json, items
    from oreal_jax.evaluation.tables import show_reports
    from oreal_jax.metrics import compilations
    from oreal_jax.verify import Pool

    screen = Screen.on_stderr()
    check_min(1, "--k", args.k)
    if args.greedy and args.k == 1:
        raise InputError("--greedy with --k 1: one sample is greedy already")
    check_apart({"--items": args.items, "--json": args.json}, {"--data": args.data})
    if args.items and args.items.suffix not in (".jsonl", ".json"):
        raise InputError(f"--items {args.items}: expected a .jsonl file")
    for path in (args.items, args.json):
        if path:
            check_writable(path)
    if args.k == 1 and args.temperature != generation_defaults()["temperature"]:
        raise InputError("--temperature with --k 1: one sample is greedy")
    sets = load_sets(args.data, args.folder)
    if args.limit is not None:
        check_min(1, "--limit", args.limit)
        sets = [each._replace(problems=each.problems[: args.limit]) for each in sets]
    check_fields(sets, args.by)
    verification = pool_settings(args)
    sampling = make_sampling(args, args.k == 1)
    greedy = make_sampling(args, True) if args.greedy or args.k == 1 else None
    out = args.items or args.json
    model, engine = load_for_generation(args, sampling, out=out)
    log_verifiers(args, model.source.settings, screen.log)
    chat = model.chat
    problems = [problem for each in sets for problem in each.problems]
    options = generation_options(args)
    settings = generation_settings(model.source, chat, problems, options)
    item_settings = settings | {
        "k": args.k,
        "judge_model": args.judge_model,
        "verifiers": configuration.as_json(verification[1]) if verification else [RULE],
    }
    if args.items:
        check_items_overwritable(args.items, item_settings)
    with (
        open_judge(args, screen) as judge,
        resumable(out, settings, screen.log) as records,
    ):
        with screen.phase("load"):
            weights = engine.weights(model.params)
        del model  # frees the loaded weights
        with Pool(os.cpu_count() or 1, *verification) as pool:
            evaluator = Evaluator(
                engine=engine,
                weights=weights,
                chat=chat,
                pool=pool,
                judge=judge,
                screen=screen,
                seed=args.seed,
                records=records,
            )
            sampled = sampling if args.k > 1 else None
            reports = evaluator.reports(sets, greedy, sampled, args.k, args.by)
        performance = compilations.take()
        if args.items:
            write_lines(args.items, items(reports, item_settings))
        if args.json:
            document = as_json(args.model, reports, item_settings) | performance
            text = json.dumps(document, ensure_ascii=False, indent=1)
            write_text(args.json, text + "\n")
    show_reports(args.model, reports)
    screen.log(
        f"{performance['perf/compilations']:.0f} programs compiled; tracing, compiling "
        f"and loading took {performance['perf/compile_seconds']:.1f} s"
    )


def compare(args: argparse.Namespace) -> None:
    """Run `oreal compare`."""
    from oreal_jax.evaluation import compare, tables

    check_seed(args.seed)
    if args.json:
        check_apart({"--json": args.json}, {"an input": [args.first, args.second]})
        check_writable(args.json)
    comparisons = compare(args.first, args.second, args.seed, args.ignore_settings)
    if args.json:
        text = json.dumps([each.as_json() for each in comparisons], indent=1)
        write_text(args.json, text + "\n")
    table = tables.comparison_table(str(args.first), str(args.second), comparisons)
    tables.show(table)
