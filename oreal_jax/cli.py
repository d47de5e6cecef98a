"""`oreal <verb>`: parse, call, print. What a verb does lives in the room it calls."""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from oreal_jax.errors import BadInput, Failure


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb. Exit codes: 0 done, 1 it cannot go on, 2 bad input,
    130 interrupted."""
    parsed = parser().parse_args(arguments)
    try:
        parsed.call(parsed)
    except BadInput as error:
        print(f"oreal: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("oreal: interrupted", file=sys.stderr)
        return 130
    except Failure as error:
        print(f"oreal: {error}", file=sys.stderr)
        return 1
    return 0


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default in (None, False, [])
        return action.help if plain else super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    from oreal_jax import cli_data

    top = argparse.ArgumentParser(
        prog="oreal",
        description="Outcome-reward reinforcement learning for mathematical reasoning "
        "(OREAL, arXiv:2502.06781) in JAX.",
        epilog="Each verb explains itself: oreal train --help",
    )
    verbs = top.add_subparsers(required=True, metavar="VERB", title="verbs")

    def verb(name: str, call: Callable, help: str, example: str, of=verbs):
        made = of.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example: {example}",
            formatter_class=_Help,
        )
        made.set_defaults(call=call)
        return made

    for name, call, what in [
        ("train", train, "train with OREAL; an existing run directory is continued"),
        (
            "sft",
            sft,
            "fine-tune on solutions (SFT, or RFT on a model's own right ones)",
        ),
    ]:
        made = verb(name, call, what, f"oreal {name} configs/{name}.py --set steps=20")
        made.add_argument("config", type=Path, help="a Python file defining `config`")
        made.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="set a field, dotted where nested: --set policy.learning_rate=1e-6",
        )
        made.add_argument(
            "--run", type=Path, help="run directory (default: runs/<config name>)"
        )

    made = verb(
        "sample",
        sample,
        "complete prompts",
        'oreal sample --model runs/demo --prompt "What is 2 + 3?" --n 4',
    )
    _model(made)
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="one question")
    what.add_argument("--file", type=Path, help="JSON lines with a `question` each")
    made.add_argument("--n", type=int, default=1, help="completions per prompt")
    _sampling(made)
    made.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a completion before this text (or at this special token); may be "
        "repeated",
    )
    made.add_argument("--json", action="store_true", help="JSON lines")

    made = verb(
        "eval",
        evaluate,
        "measure pass@1, avg@k, pass@k and maj@k on questions with gold answers",
        "oreal eval --model runs/demo --data heldout.jsonl --data math500 --k 8",
    )
    _model(made)
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
    _sampling(made, greedy=False)
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

    data = verbs.add_parser(
        "data", help="clean prompts, measure pass rates, collect RFT sets"
    ).add_subparsers(required=True, metavar="VERB")
    cli_data.add(functools.partial(verb, of=data))

    convert = verbs.add_parser(
        "convert", help="convert weights from and to Hugging Face format"
    ).add_subparsers(required=True, metavar="DIRECTION")
    for name, call, what in [
        (
            "from-hf",
            from_hf,
            "a Hugging Face directory or .gguf file to a run directory",
        ),
        ("to-hf", to_hf, "a model or run directory to a Hugging Face directory"),
    ]:
        made = verb(name, call, what, f"oreal convert {name} SRC DST", of=convert)
        made.add_argument("source", type=Path)
        made.add_argument("destination", type=Path)
        made.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
        if name == "to-hf":
            made.add_argument("--max-shard-size", type=size, default="5GB")

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
    made = verb(
        "losses",
        losses,
        "compare losses on saved trajectories; needs no model",
        "oreal losses runs/demo/run/trajectories/step_000005.jsonl --loss released "
        "--loss grpo --loss configs/my_loss.py --picture losses.png",
    )
    made.add_argument(
        "trajectories",
        type=Path,
        nargs="+",
        help="files of a run's trajectories/, or that folder; together one batch",
    )
    made.add_argument(
        "--loss",
        action="append",
        metavar="NAME|CONFIG.py",
        help="a preset (another word lists them all) or a config file with a loss of "
        "your own; may be repeated (default: released, paper, grpo)",
    )
    made.add_argument(
        "--trajectory",
        action="append",
        default=[],
        metavar="STEP/ID/SAMPLE",
        help="a completion to draw; may be repeated (default: one right, one wrong)",
    )
    made.add_argument("--picture", type=Path, help="draw coefficients into this file")
    made.add_argument("--json", type=Path, help="write all numbers here")
    return top


def folder(made: argparse.ArgumentParser) -> None:
    """Adds where presets are looked for."""
    made.add_argument(
        "--folder",
        type=Path,
        default=Path("data"),
        help="where a preset NAME is read from NAME.jsonl, before the hub is asked",
    )


def at_least(least: int, option: str, value: int) -> None:
    """Raises BadInput where the value of an option is too small."""
    if value < least:
        raise BadInput(f"{option} {value}: must be at least {least}")


def drawing_defaults() -> dict[str, Any]:
    """The options that completions depend on, with their defaults."""
    made = argparse.ArgumentParser()
    _model(made, required=False)
    _sampling(made, greedy=False)
    found = vars(made.parse_args([]))
    return {k: v for k, v in found.items() if k not in ("model", "rows")}


def drawing_options(parsed: argparse.Namespace) -> dict[str, Any]:
    """Those of them that a verb has, as they were given."""
    given = vars(parsed)
    return {name: given[name] for name in drawing_defaults() if name in given}


def _model(made: argparse.ArgumentParser, *, required: bool = True) -> None:
    made.add_argument(
        "--model", required=required, help="a Hugging Face directory or a run directory"
    )
    made.add_argument(
        "--system-prompt",
        help="system message (default: the run's, else the chat template's own)",
    )
    made.add_argument(
        "--rows", type=int, default=64, help="completions drawn at a time"
    )
    made.add_argument(
        "--weights",
        choices=["full", "int8"],
        default="full",
        help="int8: weights in eight bits while decoding",
    )
    made.add_argument(
        "--cache",
        choices=["full", "float8"],
        default="full",
        help="float8: keys and values in eight bits",
    )


def _sampling(made: argparse.ArgumentParser, *, greedy: bool = True) -> None:
    made.add_argument(
        "--temperature", type=float, default=1.0, help="0: always the likeliest"
    )
    made.add_argument(
        "--top-p", type=float, default=0.9, help="likeliest tokens of this mass; 1: off"
    )
    made.add_argument("--top-k", type=int, default=0, help="likeliest tokens; 0: off")
    made.add_argument(
        "--min-p", type=float, default=0.0, help="share of the likeliest; 0: off"
    )
    made.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="divides the logits of tokens that prompt or completion have; 1: off",
    )
    made.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        help="taken from the logits of tokens that the completion has",
    )
    made.add_argument(
        "--frequency-penalty",
        type=float,
        default=0.0,
        help="taken from a token's logit each time the completion has it",
    )
    made.add_argument(
        "--logit-bias",
        type=bias,
        action="append",
        default=[],
        metavar="TOKEN=VALUE",
        help="added to the logit of a token, given by its number; may be repeated",
    )
    made.add_argument(
        "--max-tokens", type=int, default=512, help="tokens of a completion at most"
    )
    made.add_argument("--seed", type=int, default=0, help="of all random numbers")
    if greedy:
        made.add_argument("--greedy", action="store_true", help="always the likeliest")


def bias(text: str) -> tuple[int, float]:
    """A token and what is added to its logit, from "1234=-5"."""
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected e.g. 1234=-5") from None


def size(text: str) -> int:
    """Bytes from "5GB", "200MB" or a plain number."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = (text[:-2], text[-2:].upper()) if text[-2:].isalpha() else (text, "")
    try:
        return int(float(number) * (units[unit] if unit else 1))
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r}: expected e.g. 5GB") from None


def train(parsed: argparse.Namespace) -> None:
    """`oreal train`."""
    from oreal_jax.config import TrainConfig
    from oreal_jax.train.loop import train

    _run(parsed, TrainConfig, train)


def sft(parsed: argparse.Namespace) -> None:
    """`oreal sft`."""
    from oreal_jax.config import SftConfig
    from oreal_jax.train.sft import sft

    _run(parsed, SftConfig, sft)


def _run(parsed: argparse.Namespace, kind: type, work: Callable) -> None:
    from oreal_jax import config
    from oreal_jax.console import Screen

    run = parsed.run or Path("runs") / parsed.config.stem
    screen = Screen()
    try:
        work(config.load(parsed.config, kind, parsed.set), run, screen)
    except KeyboardInterrupt:
        screen.say(f"go on with the same command; the run is in {run}")
        raise
    screen.say(f"done: {run}")


class _Open:
    """A model ready to draw completions; `stops` are texts that end them."""

    def __init__(self, parsed: argparse.Namespace, sampling, stops=()):
        from oreal_jax import sharding
        from oreal_jax.checkpoints.source import open_model
        from oreal_jax.data import Chat, load_tokenizer
        from oreal_jax.sampling import Engine, token_table
        from oreal_jax.train.session import compute_dtype

        source = self.source = open_model(parsed.model)
        mesh = sharding.make_mesh(sharding.MeshShape(), source.config)
        dtype = compute_dtype("auto")
        system_prompt = parsed.system_prompt
        if system_prompt is None:
            system_prompt = source.system_prompt
        tokenizer = load_tokenizer(source.files)
        words = [text for text in stops if text in tokenizer.all_special_tokens]
        strings = [text for text in stops if text not in words]
        self.chat = Chat(tokenizer, system_prompt, stop_strings=strings)
        self.engine = Engine(
            source.config,
            mesh,
            sampling,
            self.chat.stop_tokens(words),
            stop_table=token_table(strings, self.chat.token_bytes, source.config.vocab),
            rows=parsed.rows,
            dtype=dtype,
            weights=parsed.weights,
            cache=parsed.cache,
        )
        self.load = lambda: source.load(mesh, dtype)


def _how(parsed: argparse.Namespace, greedy: bool):
    from oreal_jax.sampling import Sampling

    return Sampling(
        max_tokens=parsed.max_tokens,
        temperature=0.0 if greedy else parsed.temperature,
        top_p=parsed.top_p,
        top_k=parsed.top_k,
        min_p=parsed.min_p,
        repetition_penalty=parsed.repetition_penalty,
        presence_penalty=parsed.presence_penalty,
        frequency_penalty=parsed.frequency_penalty,
        logit_bias=tuple(parsed.logit_bias),
    )


def sample(parsed: argparse.Namespace) -> None:
    """`oreal sample`."""
    from oreal_jax.console import Screen
    from oreal_jax.data import read_questions
    from oreal_jax.sampling import Completion, Request

    screen = Screen.on_stderr()
    questions = [parsed.prompt] if parsed.file is None else read_questions(parsed.file)
    opened = _Open(parsed, _how(parsed, parsed.greedy), parsed.stop)
    requests = [Request(opened.chat.encode(q), i) for i, q in enumerate(questions)]
    with screen.phase("load"):
        params = opened.load()
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
                params,
                requests,
                parsed.n,
                seed=parsed.seed,
                on_progress=lambda tokens, finished: advance(finished, tokens),
                on_finished=finished,
            )
    finally:  # interrupted or not: what is finished is said, in order
        for _, row in sorted(rows.items()):
            text = json.dumps(row, ensure_ascii=False)
            print(text if parsed.json else row["completion"])


def evaluate(parsed: argparse.Namespace) -> None:
    """`oreal eval`."""
    from oreal_jax.console import Screen
    from oreal_jax.data.prompts import check_writable, write_lines, write_text
    from oreal_jax.evaluation import kept_beside, load_sets, run
    from oreal_jax.evaluation.attempts import drawing
    from oreal_jax.verify import Pool

    screen = Screen.on_stderr()
    at_least(1, "--k", parsed.k)
    if parsed.greedy and parsed.k == 1:
        raise BadInput("--greedy with --k 1: one sample is greedy already")
    for path in (parsed.items, parsed.json):
        if path:
            check_writable(path)
    sets = load_sets(parsed.data, parsed.folder)
    if parsed.limit is not None:
        at_least(1, "--limit", parsed.limit)
        sets = [each._replace(problems=each.problems[: parsed.limit]) for each in sets]
    run.check_fields(sets, parsed.by)
    how = _how(parsed, parsed.k == 1)
    opened = _Open(parsed, how)
    plan = run.Plan(None, opened.engine, parsed.k)
    if parsed.k == 1:
        plan = run.Plan(opened.engine, None, 0)
    elif parsed.greedy:
        plan = plan._replace(greedy=_Open(parsed, _how(parsed, True)).engine)
    problems = [problem for each in sets for problem in each.problems]
    work = drawing(opened.source, opened.chat, problems, drawing_options(parsed))
    out = parsed.items or parsed.json
    with kept_beside(out, work, screen.say) as finished:
        with screen.phase("load"):
            params = opened.load()
        with Pool(os.cpu_count() or 1) as pool:
            reports = run.measure(
                plan,
                params,
                opened.chat,
                pool,
                sets,
                by=parsed.by,
                seed=parsed.seed,
                finished=finished,
                screen=screen,
            )
        if parsed.items:
            write_lines(parsed.items, run.items(reports))
        if parsed.json:
            whole = run.as_json(parsed.model, reports)
            text = json.dumps(whole, ensure_ascii=False, indent=1)
            write_text(parsed.json, text + "\n")
    run.show(parsed.model, reports)


def compare(parsed: argparse.Namespace) -> None:
    """`oreal compare`."""
    from oreal_jax.data.prompts import check_writable, write_text
    from oreal_jax.evaluation import compare, tables

    if parsed.json:
        check_writable(parsed.json)
    found = compare(parsed.first, parsed.second, parsed.seed)
    if parsed.json:
        text = json.dumps([one.as_json() for one in found], indent=1)
        write_text(parsed.json, text + "\n")
    tables.say(tables.compared(str(parsed.first), str(parsed.second), found))


def from_hf(parsed: argparse.Namespace) -> None:
    """`oreal convert from-hf`."""
    from oreal_jax.checkpoints.source import import_model
    from oreal_jax.console import Screen
    from oreal_jax.sharding import MeshShape, make_mesh

    screen = Screen()
    with screen.phase("convert") as advance:
        import_model(
            parsed.source,
            parsed.destination,
            lambda model: make_mesh(MeshShape(), model),
            parsed.dtype,
            lambda name: advance(),
        )
    screen.say(f"wrote {parsed.destination}")


def to_hf(parsed: argparse.Namespace) -> None:
    """`oreal convert to-hf`."""
    import jax.numpy as jnp

    from oreal_jax.checkpoints import hf
    from oreal_jax.checkpoints.source import open_model
    from oreal_jax.console import Screen
    from oreal_jax.sharding import MeshShape, make_mesh

    screen = Screen()
    source = open_model(parsed.source)
    with screen.phase("convert") as advance:
        hf.save(
            source.load(make_mesh(MeshShape(), source.config), jnp.dtype(parsed.dtype)),
            source.config,
            parsed.destination,
            source=source.files,
            max_shard_size=parsed.max_shard_size,
            on_tensor=lambda name: advance(),
        )
    screen.say(f"wrote {parsed.destination}")


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
    from oreal_jax.verify.llm_judge import Case, Judge

    # Without the question, which `verify` is not given.
    cases = [
        Case("(not given)", g, c, v) for (c, g), v in zip(pairs, verdicts, strict=True)
    ]
    with Judge(parsed.judge, parsed.judge_model, lost="rule", say=screen.say) as judge:
        judged = judge.verdicts(cases)
        counts = judge.take_metrics()
    told = {name: n for name, n in counts.items() if n}
    screen.say("  ".join(f"{name} {n:g}" for name, n in told.items()))
    return judged


def losses(parsed: argparse.Namespace) -> None:
    """`oreal losses`."""
    from oreal_jax import laboratory
    from oreal_jax.console import Screen
    from oreal_jax.metrics import replace_text

    screen = Screen()
    names = parsed.loss or ["released", "paper", "grpo"]
    chosen = {Path(name).stem: laboratory.load_loss(name) for name in names}
    recorded = laboratory.read(parsed.trajectories)
    places = laboratory.choose(recorded, parsed.trajectory)
    with screen.phase("examine", total=len(chosen)) as advance:
        examined = {}
        for name, loss in chosen.items():
            examined[name] = laboratory.examine(loss, recorded)
            advance()
    for table in laboratory.tables(examined):
        screen.console.print(table)
    if parsed.json:
        text = json.dumps(laboratory.as_json(examined, recorded), indent=1)
        replace_text(parsed.json, text + "\n")
    if parsed.picture:
        laboratory.draw(examined, recorded, places, parsed.picture)
