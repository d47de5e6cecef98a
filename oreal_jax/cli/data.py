"""`oreal data <verb>`: from raw rows to prompts with pass rates and an RFT set."""

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from oreal_jax.cli.options import (
    GenerationModel,
    Verb,
    check_min,
    check_seed,
    folder,
    generation_defaults,
    generation_options,
    make_sampling,
    model_options,
    sampling_options,
)
from oreal_jax.errors import InputError
from oreal_jax.files import check_apart, check_writable, write_lines

# Options that name files or data sets.
FILES = ("data", "evaluation", "pool", "skills", "completions", "removed", "out")
K, ROWS = 16, 64  # completions of a prompt, and drawn at a time
OUT = "a .jsonl file, or a directory for a TFDS data set"


def add(verb: Verb) -> None:
    """Adds the verbs to `oreal data`."""
    made = verb(
        "build",
        build,
        "clean prompts: plain answers, no duplicates, nothing of a test set",
        "oreal data build --data raw.jsonl --evaluation math500 --out prompts",
    )
    made.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="SOURCE",
        help="a jsonl or parquet file, a built data set or a Hugging Face data set; "
        "may be repeated",
    )
    _out(made, OUT)
    made.add_argument(
        "--evaluation",
        action="append",
        default=[],
        metavar="SET",
        help="a file or preset whose questions must not be trained on; may be repeated",
    )
    folder(made)
    made.add_argument(
        "--ngram",
        type=int,
        default=13,
        help="words in a row that make an overlap with an evaluation question",
    )
    made.add_argument("--question", default="question", help="field of the question")
    made.add_argument("--answer", default="gold_answer", help="field of the answer")
    made.add_argument(
        "--removed", type=Path, help="write what was left out, and why, here (.jsonl)"
    )

    made = verb(
        "pass-rate",
        pass_rate,
        "measure how often a model solves each prompt; goes on after Ctrl-C",
        "oreal data pass-rate --model runs/sft --data prompts --out measured.jsonl",
    )
    _drawing(made, required=True)
    _out(made, OUT)
    made.add_argument(
        "--completions", type=Path, help="write judged completions here (.jsonl)"
    )

    made = verb(
        "rft",
        rft,
        "collect a model's own correct completions for `oreal sft`",
        "oreal data rft --completions judged.jsonl --keep 4 --out solutions.jsonl",
    )
    made.add_argument(
        "--completions",
        type=Path,
        action="append",
        metavar="FILE",
        help="judged completions of `oreal data pass-rate`; may be repeated",
    )
    _drawing(made, required=False)
    _out(made, "a .jsonl file of `question, solution` rows")
    made.add_argument(
        "--keep", type=int, default=4, help="different solutions of a question at most"
    )

    made = verb(
        "label",
        label,
        "let a model name the skills that each prompt needs",
        "oreal data label --model DIR --data prompts --skills skills.txt "
        "--out labelled.jsonl",
    )
    model_options(made)
    made.add_argument("--data", required=True, metavar="SOURCE", help="prompts")
    made.add_argument(
        "--skills", type=Path, required=True, help="a file with one skill a line"
    )
    made.add_argument(
        "--max-tokens", type=int, default=64, help="tokens of a completion at most"
    )
    _out(made, OUT)

    made = verb(
        "weak",
        weak,
        "find the prompts that need skills in which the pass rate is low",
        "oreal data weak --data measured.jsonl --below 0.3 --out weak.jsonl",
    )
    made.add_argument(
        "--data", required=True, metavar="SOURCE", help="measured prompts"
    )
    made.add_argument("--by", default="skills", help="field that holds the skills")
    made.add_argument(
        "--below", type=float, default=0.5, help="pass rate under which a skill is weak"
    )
    made.add_argument(
        "--pool",
        metavar="SOURCE",
        help="take the prompts from here instead, where they have the same field",
    )
    _out(made, OUT)


def _out(made: argparse.ArgumentParser, what: str) -> None:
    made.add_argument("--out", type=Path, required=True, help=what)


def _drawing(made: argparse.ArgumentParser, *, required: bool) -> None:
    model_options(made, required=required)
    made.add_argument("--data", required=required, metavar="SOURCE", help="prompts")
    made.add_argument("--k", type=int, default=K, help="completions of a prompt")
    sampling_options(made, greedy=False)


def build(parsed: argparse.Namespace) -> None:
    """`oreal data build`."""
    from oreal_jax.data import cleaning
    from oreal_jax.data.builder import load_all, write_prompts
    from oreal_jax.evaluation import load_sets

    screen = _screen()
    check_min(1, "--ngram", parsed.ngram)
    _check_outputs(parsed, "removed")
    evaluations = load_sets(parsed.evaluation, parsed.folder, "--evaluation")
    rows = load_all(parsed.data, parsed.question, parsed.answer)
    cleaned = cleaning.clean(rows, dict(evaluations), parsed.ngram)
    if not cleaned.prompts:
        raise InputError(f"{', '.join(parsed.data)}: no prompt is left of {len(rows)}")
    statistics = cleaned.statistics()
    write_prompts(cleaned.prompts, parsed.out, statistics)
    if parsed.removed:
        write_lines(parsed.removed, [r.as_json() for r in cleaned.removed])
    for name, value in statistics.items():
        screen.say(f"{name}: {value}")
    screen.say(f"wrote {parsed.out}")


def pass_rate(parsed: argparse.Namespace) -> None:
    """`oreal data pass-rate`."""
    from oreal_jax.data import cleaning, load_prompts
    from oreal_jax.data.builder import write_prompts
    from oreal_jax.evaluation.attempts import with_pass_rates

    screen = _screen()
    _check_outputs(parsed, "completions")
    if parsed.completions and parsed.completions.suffix != ".jsonl":
        raise InputError(f"--completions {parsed.completions}: expected a .jsonl file")
    asked = load_prompts(parsed.data)
    with _attempts(parsed, asked, screen) as attempts:
        measured = with_pass_rates(attempts)
        statistics = cleaning.statistics(measured)
        if parsed.completions:
            rows = [attempt.as_json() for group in attempts for attempt in group]
            write_lines(parsed.completions, rows)
        write_prompts(measured, parsed.out, statistics)
    screen.say(f"pass_rate: {statistics['pass_rate']}")
    screen.say(f"wrote {parsed.out}")


def rft(parsed: argparse.Namespace) -> None:
    """`oreal data rft`."""
    from oreal_jax.data import load_prompts
    from oreal_jax.data.rft import harvest, read_completions

    screen = _screen()
    check_min(1, "--keep", parsed.keep)
    check_seed(parsed.seed)
    given = [x is not None for x in (parsed.completions, parsed.model, parsed.data)]
    if given not in ([True, False, False], [False, True, True]):
        raise InputError("rft takes either --completions, or --model and --data")
    # What says how completions are drawn has no say where they are there already;
    # the seed also draws the solutions.
    unused = generation_defaults() | {"k": K, "rows": ROWS}
    for name, default in unused.items():
        if parsed.completions and name != "seed" and getattr(parsed, name) != default:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} with --completions: those are drawn already")
    if parsed.out.suffix != ".jsonl":
        raise InputError(f"--out {parsed.out}: expected a .jsonl file")
    _check_outputs(parsed)

    def collect(rows: list[dict]) -> None:
        found = harvest(rows, parsed.keep, parsed.seed)
        screen.say(str(found))
        if not found.solutions:
            raise InputError("no completion is correct: there is nothing to learn from")
        write_lines(parsed.out, [solution._asdict() for solution in found.solutions])

    if parsed.completions:
        collect(read_completions(parsed.completions))
    else:
        with _attempts(parsed, load_prompts(parsed.data), screen) as attempts:
            collect([attempt.as_json() for group in attempts for attempt in group])
    screen.say(f"wrote {parsed.out}")


def label(parsed: argparse.Namespace) -> None:
    """`oreal data label`."""
    from oreal_jax.data import load_prompts, skills
    from oreal_jax.data.builder import write_prompts
    from oreal_jax.data.cleaning import statistics
    from oreal_jax.evaluation.attempts import draw, drawing, kept_beside
    from oreal_jax.sampling import Sampling

    screen = _screen()
    _check_outputs(parsed)
    names = skills.read_skills(parsed.skills)
    asked = load_prompts(parsed.data)
    requests = [skills.request(prompt, names) for prompt in asked]
    sampling = Sampling(max_tokens=parsed.max_tokens, temperature=0.0)
    opened = GenerationModel(parsed, sampling)
    options = generation_options(parsed)
    work = drawing(opened.source, opened.chat, requests, options)
    with (
        kept_beside(parsed.out, work, screen.say) as finished,
        screen.phase("gen", total=len(requests)) as advance,
    ):
        drawn = draw(
            opened.engine,
            opened.engine.weights(opened.load()),
            sampling,
            opened.chat,
            requests,
            1,
            seed=0,
            finished=finished,
            on_progress=lambda tokens, finished: advance(finished, tokens),
        )
        said = [completion for (completion,) in drawn]
        found = [
            skills.labelled(prompt, one.completion, names)
            for prompt, one in zip(asked, said, strict=True)
        ]
        write_prompts(found, parsed.out, statistics(found))
    none = sum(not prompt.values(skills.FIELD) for prompt in found)
    screen.say(f"{len(found)} prompts, {none} without any of the {len(names)} skills")
    screen.say(f"wrote {parsed.out}")


def weak(parsed: argparse.Namespace) -> None:
    """`oreal data weak`."""
    from oreal_jax.data import load_prompts, skills
    from oreal_jax.data.builder import write_prompts
    from oreal_jax.data.cleaning import statistics

    screen = _screen()
    _check_outputs(parsed)
    if not 0 < parsed.below <= 1:
        raise InputError(f"--below {parsed.below}: must be above 0 and at most 1")
    measured = load_prompts(parsed.data)
    pool = load_prompts(parsed.pool) if parsed.pool else measured
    found = skills.by_skill(parsed.data, measured, parsed.by)
    lacking = {skill.name for skill in found if skill.pass_rate < parsed.below}
    for skill in found:
        mark = "weak" if skill.name in lacking else ""
        counted = f"{skill.prompts:6d} prompts"
        screen.say(f"{skill.pass_rate:6.1%} {counted}  {skill.name}  {mark}".rstrip())
    chosen = skills.needing(pool, parsed.by, lacking)
    if not chosen:
        raise InputError(
            f"{parsed.pool or parsed.data}: no prompt needs a skill with a pass rate "
            f"below {parsed.below}"
        )
    write_prompts(chosen, parsed.out, statistics(chosen))
    screen.say(f"wrote {len(chosen)} prompts to {parsed.out}")


def _screen():
    from oreal_jax.console import Screen

    return Screen()


def _check_outputs(parsed: argparse.Namespace, *others: str) -> None:
    """Checks `--out` and other options that name outputs."""
    from oreal_jax.data.builder import check_prompts_writable

    given = {f"--{name}": vars(parsed)[name] for name in FILES if name in parsed}
    outputs = [f"--{name}" for name in ("out", *others)]
    inputs = {name: path for name, path in given.items() if name not in outputs}
    check_apart({name: given[name] for name in outputs}, inputs)
    check_prompts_writable(parsed.out)
    for name in outputs[1:]:
        if given[name] is not None:
            check_writable(given[name])


@contextlib.contextmanager
def _attempts(
    parsed: argparse.Namespace, prompts: Sequence, screen
) -> Iterator[list[list]]:
    """K judged completions of each prompt, kept while the block lasts."""
    from oreal_jax.evaluation.attempts import draw, drawing, judge, kept_beside
    from oreal_jax.verify import Pool

    check_min(1, "--k", parsed.k)
    opened = GenerationModel(parsed, make_sampling(parsed, greedy=False))
    options = generation_options(parsed)
    work = drawing(opened.source, opened.chat, prompts, options)
    total = len(prompts) * parsed.k
    with kept_beside(parsed.out, work, screen.say) as finished:
        with screen.phase("load"):
            weights = opened.engine.weights(opened.load())
        with screen.phase("gen", total=total) as advance:
            drawn = draw(
                opened.engine,
                weights,
                opened.sampling,
                opened.chat,
                prompts,
                parsed.k,
                seed=parsed.seed,
                finished=finished,
                on_progress=lambda tokens, finished: advance(finished, tokens),
            )
        with (
            Pool(os.cpu_count() or 1) as pool,
            screen.phase("verify", total=total) as advance,
        ):
            attempts = judge(pool, prompts, drawn, advance)
        yield attempts
