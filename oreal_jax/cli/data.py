"""`oreal data <verb>`: from raw rows to prompts with pass rates and an RFT set."""

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from oreal_jax.cli.options import (
    Verb,
    check_min,
    check_seed,
    folder,
    generation_defaults,
    generation_options,
    load_for_generation,
    log_verifiers,
    make_sampling,
    model_options,
    pool_settings,
    sampling_options,
    verifier_options,
)
from oreal_jax.errors import InputError
from oreal_jax.files import check_apart, check_writable, write_lines

# Options that name files or data sets.
FILES = ("data", "evaluation", "pool", "skills", "completions", "removed", "out")
K, ROWS = 16, 64  # defaults of --k and --rows
OUT = "a .jsonl file, or a directory for a TFDS data set"


def add(verb: Verb) -> None:
    """Add the verbs to `oreal data`."""
    command = verb(
        "build",
        build,
        "clean prompts: bare answers, no duplicates, no evaluation questions",
        "oreal data build --data raw.jsonl --evaluation math500 --out prompts",
    )
    command.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="SOURCE",
        help="a jsonl or parquet file, a built data set or one of Hugging Face "
        "(OWNER/NAME:SPLIT); may be repeated",
    )
    _add_out(command, OUT)
    command.add_argument(
        "--evaluation",
        action="append",
        default=[],
        metavar="SET",
        help="a file or preset whose questions must not be trained on; may be repeated",
    )
    folder(command)
    command.add_argument(
        "--ngram",
        type=int,
        default=13,
        help="consecutive words that make an overlap with an evaluation question",
    )
    command.add_argument("--question", default="question", help="field of the question")
    command.add_argument("--answer", default="gold_answer", help="field of the answer")
    command.add_argument(
        "--removed",
        type=Path,
        help="write removed prompts and the reasons here (.jsonl)",
    )

    command = verb(
        "pass-rate",
        pass_rate,
        "measure how often a model solves each prompt; resumes after Ctrl-C",
        "oreal data pass-rate --model runs/sft --data prompts --out measured.jsonl",
    )
    _add_generation(command, required=True)
    _add_out(command, OUT)
    command.add_argument(
        "--completions", type=Path, help="write verified completions here (.jsonl)"
    )

    command = verb(
        "rft",
        rft,
        "collect a model's own correct completions for `oreal sft`",
        "oreal data rft --completions judged.jsonl --keep 4 --out solutions.jsonl",
    )
    command.add_argument(
        "--completions",
        type=Path,
        action="append",
        metavar="FILE",
        help="verified completions of `oreal data pass-rate`; may be repeated",
    )
    _add_generation(command, required=False)
    _add_out(command, "a .jsonl file of `question, solution` rows")
    command.add_argument(
        "--keep",
        type=int,
        default=4,
        help="maximum number of different solutions per question",
    )

    command = verb(
        "label",
        label,
        "let a model name the skills that each prompt needs",
        "oreal data label --model DIR --data prompts --skills skills.txt "
        "--out labelled.jsonl",
    )
    model_options(command)
    command.add_argument("--data", required=True, metavar="SOURCE", help="prompts")
    command.add_argument(
        "--skills", type=Path, required=True, help="a file with one skill per line"
    )
    command.add_argument(
        "--max-tokens", type=int, default=64, help="maximum tokens of a completion"
    )
    _add_out(command, OUT)

    command = verb(
        "weak",
        weak,
        "find the prompts that need skills in which the pass rate is low",
        "oreal data weak --data measured.jsonl --below 0.3 --out weak.jsonl",
    )
    command.add_argument(
        "--data", required=True, metavar="SOURCE", help="measured prompts"
    )
    command.add_argument("--by", default="skills", help="field that holds the skills")
    command.add_argument(
        "--below", type=float, default=0.5, help="pass rate below which a skill is weak"
    )
    command.add_argument(
        "--pool",
        metavar="SOURCE",
        help="select from these prompts instead, which need the same field",
    )
    _add_out(command, OUT)


def _add_out(command: argparse.ArgumentParser, help: str) -> None:
    command.add_argument("--out", type=Path, required=True, help=help)


def _add_generation(command: argparse.ArgumentParser, *, required: bool) -> None:
    model_options(command, required=required)
    command.add_argument("--data", required=required, metavar="SOURCE", help="prompts")
    command.add_argument("--k", type=int, default=K, help="completions per prompt")
    sampling_options(command, greedy=False)
    verifier_options(command)


def build(args: argparse.Namespace) -> None:
    """Run `oreal data build`."""
    from oreal_jax.console import Screen
    from oreal_jax.data import cleaning
    from oreal_jax.data.builder import load_all, write_prompts
    from oreal_jax.evaluation import load_sets

    screen = Screen()
    check_min(1, "--ngram", args.ngram)
    _check_outputs(args, "removed")
    evaluations = load_sets(args.evaluation, args.folder, "--evaluation")
    prompts = load_all(args.data, args.question, args.answer)
    cleaned = cleaning.clean(prompts, dict(evaluations), args.ngram)
    if not cleaned.prompts:
        sources = ", ".join(args.data)
        raise InputError(f"{sources}: no prompt is left of {len(prompts)}")
    statistics = cleaned.statistics()
    write_prompts(cleaned.prompts, args.out, statistics)
    if args.removed:
        write_lines(args.removed, [r.as_json() for r in cleaned.removed])
    for name, value in statistics.items():
        screen.log(f"{name}: {value}")
    screen.log(f"wrote {args.out}")


def pass_rate(args: argparse.Namespace) -> None:
    """Run `oreal data pass-rate`."""
    from oreal_jax.console import Screen
    from oreal_jax.data import cleaning, load_prompts
    from oreal_jax.data.builder import write_prompts
    from oreal_jax.evaluation.completions import with_pass_rates

    screen = Screen()
    _check_outputs(args, "completions")
    if args.completions and args.completions.suffix != ".jsonl":
        raise InputError(f"--completions {args.completions}: expected a .jsonl file")
    with _verified_completions(args, load_prompts(args.data), screen) as groups:
        measured = with_pass_rates(groups)
        statistics = cleaning.statistics(measured)
        if args.completions:
            write_lines(args.completions, _rows(groups))
        write_prompts(measured, args.out, statistics)
    screen.log(f"pass_rate: {statistics['pass_rate']}")
    screen.log(f"wrote {args.out}")


def rft(args: argparse.Namespace) -> None:
    """Run `oreal data rft`."""
    from oreal_jax.console import Screen
    from oreal_jax.data import load_prompts
    from oreal_jax.data.rft import read_completions, select_solutions

    screen = Screen()
    check_min(1, "--keep", args.keep)
    check_seed(args.seed)
    inputs = [x is not None for x in (args.completions, args.model, args.data)]
    if inputs not in ([True, False, False], [False, True, True]):
        raise InputError("rft takes either --completions, or --model and --data")
    # These options have no effect on existing completions; the seed also selects the
    # solutions.
    defaults = {**generation_defaults(), "k": K, "rows": ROWS, "config": None}
    for name, default in defaults.items():
        if args.completions and name != "seed" and getattr(args, name) != default:
            option = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{option} with --completions: they are already generated and verified"
            )
    if args.out.suffix != ".jsonl":
        raise InputError(f"--out {args.out}: expected a .jsonl file")
    _check_outputs(args)

    def write_solutions(rows: list[dict]) -> None:
        rft_set = select_solutions(rows, args.keep, args.seed)
        screen.log(str(rft_set))
        if not rft_set.solutions:
            raise InputError("no completion is correct: there is nothing to learn from")
        write_lines(args.out, [solution._asdict() for solution in rft_set.solutions])

    if args.completions:
        write_solutions(read_completions(args.completions))
    else:
        with _verified_completions(args, load_prompts(args.data), screen) as groups:
            write_solutions(_rows(groups))
    screen.log(f"wrote {args.out}")


def label(args: argparse.Namespace) -> None:
    """Run `oreal data label`."""
    from oreal_jax.console import Screen
    from oreal_jax.data import load_prompts, skills
    from oreal_jax.data.builder import write_prompts
    from oreal_jax.data.cleaning import statistics
    from oreal_jax.sampling import Sampling

    screen = Screen()
    _check_outputs(args)
    names = skills.read_skills(args.skills)
    prompts = load_prompts(args.data)
    requests = [skills.make_request(prompt, names) for prompt in prompts]
    sampling = Sampling(max_tokens=args.max_tokens, temperature=0.0)
    with _completions(args, requests, sampling, 1, 0, screen) as groups:
        labelled = [
            skills.add_skills(prompt, completion.completion, names)
            for prompt, (completion,) in zip(prompts, groups, strict=True)
        ]
        write_prompts(labelled, args.out, statistics(labelled))
    count = sum(not prompt.values(skills.FIELD) for prompt in labelled)
    screen.log(
        f"{len(labelled)} prompts, {count} without any of the {len(names)} skills"
    )
    screen.log(f"wrote {args.out}")


def weak(args: argparse.Namespace) -> None:
    """Run `oreal data weak`."""
    from oreal_jax.console import Screen
    from oreal_jax.data import load_prompts, skills
    from oreal_jax.data.builder import write_prompts
    from oreal_jax.data.cleaning import statistics

    screen = Screen()
    _check_outputs(args)
    if not 0 < args.below <= 1:
        raise InputError(f"--below {args.below}: must be above 0 and at most 1")
    measured = load_prompts(args.data)
    pool = load_prompts(args.pool) if args.pool else measured
    ranked = skills.rank_skills(args.data, measured, args.by)
    weak_skills = {skill.name for skill in ranked if skill.pass_rate < args.below}
    for skill in ranked:
        mark = "weak" if skill.name in weak_skills else ""
        count = f"{skill.prompts:6d} prompts"
        screen.log(f"{skill.pass_rate:6.1%} {count}  {skill.name}  {mark}".rstrip())
    selected = skills.select_prompts(pool, args.by, weak_skills)
    if not selected:
        raise InputError(
            f"{args.pool or args.data}: no prompt needs a skill with a pass rate "
            f"below {args.below}"
        )
    write_prompts(selected, args.out, statistics(selected))
    screen.log(f"wrote {len(selected)} prompts to {args.out}")


def _check_outputs(args: argparse.Namespace, *others: str) -> None:
    """Check `--out` and other options that name outputs."""
    from oreal_jax.data.builder import check_prompts_writable

    paths = {f"--{name}": vars(args)[name] for name in FILES if name in args}
    outputs = {f"--{name}": paths.pop(f"--{name}") for name in ("out", *others)}
    check_apart(outputs, inputs=paths)
    check_prompts_writable(args.out)
    for name in others:
        if (path := outputs[f"--{name}"]) is not None:
            check_writable(path)


@contextlib.contextmanager
def _completions(
    args: argparse.Namespace, prompts: Sequence, sampling, k: int, seed: int, screen
) -> Iterator[list[list]]:
    """Yield `k` completions of each prompt, saved until the block ends."""
    from oreal_jax.evaluation.generation import (
        generate,
        generation_settings,
        resumable,
    )

    model, engine = load_for_generation(args, sampling, out=args.out)
    chat, options = model.chat, generation_options(args)
    if "config" in args:  # its verbs verify
        log_verifiers(args, model.source.settings, screen.log)
    settings = generation_settings(model.source, chat, prompts, options)
    with resumable(args.out, settings, screen.log) as records:
        with screen.phase("load"):
            weights = engine.weights(model.params)
        del model  # frees the loaded weights
        with screen.phase("gen", total=len(prompts) * k) as advance:
            groups = generate(
                engine,
                weights,
                sampling,
                chat,
                prompts,
                k,
                seed=seed,
                records=records,
                on_progress=lambda tokens, finished: advance(finished, tokens),
                log=screen.log,
            )
        yield groups


@contextlib.contextmanager
def _verified_completions(
    args: argparse.Namespace, prompts: Sequence, screen
) -> Iterator[list[list]]:
    """Yield verified completions of each prompt, saved until the block ends."""
    from oreal_jax.evaluation.completions import verify
    from oreal_jax.verify import Pool

    check_min(1, "--k", args.k)
    sampling, verification = make_sampling(args, greedy=False), pool_settings(args)
    seed, total = args.seed, len(prompts) * args.k
    with _completions(args, prompts, sampling, args.k, seed, screen) as groups:
        with (
            Pool(os.cpu_count() or 1, *verification) as pool,
            screen.phase("verify", total=total) as advance,
        ):
            verified = verify(pool, prompts, groups, advance)
        yield verified


def _rows(groups: Sequence[Sequence]) -> list[dict]:
    return [completion.as_json() for group in groups for completion in group]
