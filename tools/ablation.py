"""Does the ladder of the paper's table 2 hold on a model that trains in seconds?

    python tools/ablation.py runs/ablation

Every rung starts from the same fine-tuned tiny model and has the same budget: prompts,
samples, steps, learning rate. A rung differs from the one below in one thing, by its
loss. Each is run with several seeds and measured on held-out problems; a step of the
ladder is judged by the paired differences of its seeds. Results are files: what was
interrupted goes on, and more seeds may be asked for later.

The task is to sort four digits. Its model answers in five tokens, so that a token may
deserve credit that another does not; its start has learned the form of an answer from
solutions of which many are incorrect.
"""

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from oreal_jax import hardware

hardware.hide_absent_devices()  # before what follows imports JAX

import jax
import make_tiny
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy import stats

from oreal_jax import losses, model, program_cache
from oreal_jax.checkpoints import hf
from oreal_jax.checkpoints.source import open_model
from oreal_jax.config import Packing, Saving, SftConfig, TrainConfig, Verification
from oreal_jax.console import Screen
from oreal_jax.data import Chat, load_tokenizer, read_prompts
from oreal_jax.errors import InputError
from oreal_jax.evaluation import Evaluator, ProblemSet
from oreal_jax.files import write_lines, write_text
from oreal_jax.interrupts import INTERRUPTED, exit_process
from oreal_jax.mesh import MeshShape, make_mesh
from oreal_jax.optimizer import Optimizer
from oreal_jax.sampling import Engine, Sampling
from oreal_jax.train.loop import train
from oreal_jax.train.sft import sft
from oreal_jax.verify import Pool

DIGITS = 4
SWAPPED = 0.5  # share of the start's solutions in which two digits change places
ENOUGH = 0.95  # confidence of intervals and verdicts
# "released" is not a rung: it has the factor A in its cloning, as all released configs.
ROWS = (*losses.presets.LADDER, "released")
WEIGHTED = ("token_weights", "released")  # those that need a token reward model


class Size(NamedTuple):
    """Numbers of training and held-out problems, of samples per held-out problem, of
    SFT steps, of prompts per step, and of slots."""

    training: int
    held_out: int
    samples: int
    sft_steps: int
    prompts: int
    slots: int


FULL = Size(2048, 256, 8, 400, 16, 256)
SMOKE = Size(16, 4, 2, 120, 2, 8)


class Result(NamedTuple):
    """Mean accuracy on held-out problems of a row's runs, by seed."""

    row: str
    by_seed: dict[int, float]

    def interval(self) -> tuple[float, float, float]:
        """Mean over seeds and its t-interval."""
        return interval(list(self.by_seed.values()))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and t-interval of few values."""
    mean, spread = np.mean(values), stats.sem(values)
    half = spread * stats.t.ppf((1 + ENOUGH) / 2, len(values) - 1)
    return float(mean), float(mean - half), float(mean + half)


def verdict(low: float, high: float) -> str:
    """What an interval of differences says of a step up the ladder."""
    if low > 0:
        return "reproduced"
    return "not reproduced" if high < 0 else "within noise"


def problems(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Different strings of digits to sort, in a fixed random order."""
    draw = random.Random(seed)
    texts = (f"{n}" for n in range(10 ** (DIGITS - 1), 10**DIGITS))
    usable = [text for text in texts if "0" not in text]
    rows = draw.sample(usable, count)
    return [
        {"id": text, "question": f"sort {text}?", "gold_answer": "".join(sorted(text))}
        for text in rows
    ]


def solutions(rows: Sequence[dict[str, str]], seed: int = 0) -> Iterator[dict]:
    """Answers to learn the form from: in some, two digits have changed places."""
    draw = random.Random(seed)
    for row in rows:
        for _ in range(2):
            answer = list(row["gold_answer"])
            if draw.random() < SWAPPED:
                i, j = draw.sample(range(DIGITS), 2)
                answer[i], answer[j] = answer[j], answer[i]
            yield {"question": row["question"], "solution": "".join(answer)}


def make_start(home: Path, size: Size, screen: Screen) -> Path:
    """The fine-tuned model that every run starts from."""
    rows = problems(size.training + size.held_out)
    write_lines(home / "train.jsonl", rows[: size.training])
    write_lines(home / "heldout.jsonl", rows[size.training :])
    write_lines(home / "solutions.jsonl", solutions(rows[: size.training]))
    if not (home / "hf").exists():
        shape = dataclasses.replace(make_tiny.CONFIG, layers=3, embed=96, mlp=256)
        made = home / ".hf.incomplete"
        hf.save(model.init(shape, jax.random.key(0)), shape, made)
        make_tiny.tokenizer().save_pretrained(str(made))
        made.rename(home / "hf")
    config = SftConfig(
        model=str(home / "hf"),
        examples=str(home / "solutions.jsonl"),
        steps=size.sft_steps,
        examples_per_step=4 * size.prompts,
        policy=Optimizer(learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=20),
        packing=Packing(rows=8, row_length=256),
        saving=Saving(every=size.sft_steps, keep=1),
    )
    sft(config, home / "start", screen)
    return home / "start"


def config_of(home: Path, row: str, seed: int, steps: int, size: Size) -> TrainConfig:
    """The run of a row: all alike but for the loss, and the model it needs. As
    published, a ninth of the steps trains the token reward model alone."""
    rate = Optimizer(learning_rate=3e-4, final_learning_rate=1e-4, warmup_steps=2)
    weighted = row in WEIGHTED
    return TrainConfig(
        model=str(home / "start"),
        prompts=str(home / "train.jsonl"),
        seed=seed,
        steps=steps,
        prompts_per_step=size.prompts,
        samples_per_prompt=8,
        sampling=Sampling(max_tokens=8),
        max_prompt_tokens=40,
        decode_rows=8 * size.prompts,
        verification=Verification(workers=1),
        loss=losses.presets.NAMED[row],
        policy=rate,
        token_reward=dataclasses.replace(rate, learning_rate=1e-3)
        if weighted
        else None,
        freeze_steps=steps // 9 if weighted else 0,
        packing=Packing(rows=4, row_length=256),
        saving=Saving(every=steps, keep=1),
    )


def measure(run: Path, prompts: Path, size: Size, pool: Pool) -> float:
    """Mean accuracy of several samples of every held-out problem."""
    source = open_model(run)
    mesh = make_mesh(MeshShape(), source.config)
    program_cache.enable()
    chat = Chat(load_tokenizer(source.files))
    engine = Engine(source.config, mesh, chat.stop_tokens(), rows=size.slots)
    rows = read_prompts(prompts)
    weights, sampling = engine.weights(source.load(mesh)), Sampling(max_tokens=8)
    evaluator = Evaluator(
        engine=engine, weights=weights, chat=chat, pool=pool, screen=Screen.silent()
    )
    sets = [ProblemSet("heldout", rows)]
    return evaluator.reports(sets, None, sampling, size.samples)["heldout"].accuracy


def run_all(
    home: Path, seeds: int, steps: int, size: Size, screen: Screen
) -> tuple[float, list[Result]]:
    """The start's accuracy and every row's, from files where they are there."""
    home.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[int, float]] = {row: {} for row in ROWS}
    quiet = Screen(Console(file=(home / "log.txt").open("a"), highlight=False))
    with Pool(1) as pool:
        start = make_start(home, size, quiet)
        begin = kept(home / "start.json", lambda: measured(start, home, size, pool))
        screen.log(f"start: {begin:.1%} correct")
        with screen.phase("runs", total=seeds * len(ROWS)) as advance:
            for seed in range(seeds):
                for row in ROWS:
                    run = home / f"{row}_{steps}_steps" / f"seed_{seed}"

                    def accuracy(row=row, seed=seed, run=run) -> float:
                        train(config_of(home, row, seed, steps, size), run, quiet)
                        return measured(run, home, size, pool)

                    found = kept(run.with_suffix(".json"), accuracy)
                    results[row][seed] = found
                    screen.log(f"{row}, seed {seed}: {found:.1%}")
                    advance()
    return begin, [Result(row, by_seed) for row, by_seed in results.items()]


def measured(run: Path, home: Path, size: Size, pool: Pool) -> float:
    """`measure` on this study's held-out problems."""
    return measure(run, home / "heldout.jsonl", size, pool)


def kept(path: Path, compute) -> float:
    """A number from a file, or computed and kept there."""
    if path.exists():
        return json.loads(path.read_text())["accuracy"]
    value = compute()
    write_text(path, json.dumps({"accuracy": value}) + "\n")
    return value


def steps_of(results: Sequence[Result]) -> list[tuple[str, str, tuple, str]]:
    """Each step up the ladder: from, to, interval of paired differences, verdict."""
    by_row = {result.row: result.by_seed for result in results}
    judged = []
    pairs = [
        *zip(losses.presets.LADDER, losses.presets.LADDER[1:], strict=False),
        ("behaviour_cloning", "released"),
    ]
    for below, above in pairs:
        seeds = by_row[below].keys() & by_row[above].keys()
        gains = [by_row[above][seed] - by_row[below][seed] for seed in sorted(seeds)]
        mean, low, high = interval(gains)
        judged.append((below, above, (mean, low, high), verdict(low, high)))
    return judged


def report(
    home: Path, begin: float, results: Sequence[Result], steps: int, screen: Screen
) -> None:
    """Tables on screen, all numbers in a JSON file, a picture beside it."""
    rows = Table(title=f"{steps} steps from {begin:.1%}")
    for name in ("row", "seeds", "correct", "95% interval"):
        rows.add_column(name, justify="left" if name == "row" else "right")
    for result in results:
        mean, low, high = result.interval()
        span = f"{low:.1%} to {high:.1%}"
        rows.add_row(result.row, str(len(result.by_seed)), f"{mean:.1%}", span)
    rungs = Table(title="steps of the ladder")
    for name in ("from", "to", "gain, points", "95% interval", "verdict"):
        rungs.add_column(name)
    for below, above, (mean, low, high), said in steps_of(results):
        span = f"{100 * low:+.1f} to {100 * high:+.1f}"
        rungs.add_row(below, above, f"{100 * mean:+.1f}", span, said)
    screen.console.print(rows)
    screen.console.print(rungs)
    numbers = {
        "start": begin,
        "rows": {result.row: result.by_seed for result in results},
        "steps": [
            {"from": below, "to": above, "gain": gain, "verdict": said}
            for below, above, gain, said in steps_of(results)
        ],
    }
    write_text(
        home / f"results_{steps}_steps.json", json.dumps(numbers, indent=1) + "\n"
    )
    draw(home / f"ablation_{steps}_steps.png", begin, results)


def draw(picture: Path, begin: float, results: Sequence[Result]) -> None:
    """Every run as a dot, every row's mean and interval."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panel = figure.subplots()
    for place, result in enumerate(results):
        mean, low, high = (100 * x for x in result.interval())
        dots = [100 * x for x in result.by_seed.values()]
        panel.plot([place] * len(dots), dots, "o", color="tab:gray", alpha=0.5)
        panel.errorbar(
            place + 0.15, mean, [[mean - low], [high - mean]], fmt="s", capsize=4
        )
    panel.axhline(100 * begin, color="black", linestyle=":", label="start")
    panel.set_xticks(
        range(len(results)), [result.row.replace("_", "\n") for result in results]
    )
    panel.set_ylabel("correct on held-out problems, %")
    panel.legend()
    figure.savefig(picture, dpi=120)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("directory", type=Path)
    options.add_argument("--seeds", type=int, default=8, help="runs of each row")
    options.add_argument("--steps", type=int, default=18, help="the budget of a run")
    options.add_argument(
        "--smoke",
        action="store_true",
        help="quick check with two seeds, few steps and problems",
    )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study."""
    parsed = parser().parse_args(arguments)
    screen = Screen()
    size = SMOKE if parsed.smoke else FULL
    if parsed.smoke:
        parsed.seeds, parsed.steps = 2, 9
    try:
        if parsed.seeds < 2:
            raise InputError(f"--seeds {parsed.seeds}: an interval needs at least 2")
        if parsed.steps < 9:
            raise InputError(f"--steps {parsed.steps}: must be at least 9")
        cache = parsed.directory / "compiled"  # runs of a row share their programs
        jax.config.update("jax_compilation_cache_dir", str(cache.resolve()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        begin, results = run_all(
            parsed.directory, parsed.seeds, parsed.steps, size, screen
        )
        report(parsed.directory, begin, results, parsed.steps, screen)
    except InputError as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ablation: interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    exit_process(main())
