"""The ablation ladder of the paper's table 2, on a model that trains in seconds.

    python tools/ablation.py runs/ablation

Every rung starts from the same fine-tuned tiny model and has the same budget: prompts,
samples, steps, learning rate. A rung differs from the one below in one thing, by its
loss. Each is run with several seeds and measured on held-out problems; a step up the
ladder is tested by the paired differences of its seeds. Results are files: an
interrupted study resumes, and seeds can be added later.

The task is to sort four digits. The model answers in five tokens, so that tokens of an
answer may differ in credit; its start has learned the format of an answer from
solutions of which many are incorrect.
"""

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
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

from oreal_jax import (
    InputError,
    Pool,
    Sampling,
    SftConfig,
    TrainConfig,
    load_model,
    losses,
    model,
    train_oreal,
    train_sft,
)
from oreal_jax.checkpoints import hf
from oreal_jax.config import Packing, Saving, Verification
from oreal_jax.console import Screen
from oreal_jax.data import read_prompts
from oreal_jax.evaluation import Evaluator, ProblemSet
from oreal_jax.files import write_lines, write_text
from oreal_jax.interrupts import INTERRUPTED, exit_process
from oreal_jax.optimizer import Optimizer

DIGITS = 4
SWAPPED_SHARE = 0.5  # of the start's solutions: two digits are swapped
CONFIDENCE = 0.95  # of intervals and verdicts
# "released" is not a rung: it has the factor A in its cloning, as all released configs.
ROWS = (*losses.presets.LADDER, "released")
WEIGHTED = ("token_weights", "released")  # with a token reward model


class Size(NamedTuple):
    """Size of a study.

    `training` and `held_out` problems, `samples` per held-out problem; `prompts` per
    step; `slots` of the engine that measures.
    """

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
        """Return the mean over seeds and its t-interval."""
        return interval(list(self.by_seed.values()))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean and t-interval of a few values."""
    mean, spread = np.mean(values), stats.sem(values)
    half = spread * stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return float(mean), float(mean - half), float(mean + half)


def verdict(low: float, high: float) -> str:
    """Return the verdict on a step up the ladder, from its interval of gains."""
    if low > 0:
        return "reproduced"
    return "not reproduced" if high < 0 else "within noise"


def problems(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return different strings of digits to sort, in a fixed random order."""
    rng = random.Random(seed)
    texts = (f"{n}" for n in range(10 ** (DIGITS - 1), 10**DIGITS))
    usable = [text for text in texts if "0" not in text]
    rows = rng.sample(usable, count)
    return [
        {"id": text, "question": f"sort {text}?", "gold_answer": "".join(sorted(text))}
        for text in rows
    ]


def solutions(rows: Sequence[dict[str, str]], seed: int = 0) -> Iterator[dict]:
    """Yield answers to learn the format from; in some, two digits are swapped."""
    rng = random.Random(seed)
    for row in rows:
        for _ in range(2):
            answer = list(row["gold_answer"])
            if rng.random() < SWAPPED_SHARE:
                i, j = rng.sample(range(DIGITS), 2)
                answer[i], answer[j] = answer[j], answer[i]
            yield {"question": row["question"], "solution": "".join(answer)}


def make_start(home: Path, size: Size, screen: Screen) -> Path:
    """Fine-tune the model that every run starts from, unless it exists."""
    rows = problems(size.training + size.held_out)
    write_lines(home / "train.jsonl", rows[: size.training])
    write_lines(home / "heldout.jsonl", rows[size.training :])
    write_lines(home / "solutions.jsonl", solutions(rows[: size.training]))
    if not (home / "hf").exists():
        shape = dataclasses.replace(make_tiny.CONFIG, layers=3, embed=96, mlp=256)
        incomplete = home / ".hf.incomplete"
        hf.save(model.init(shape, jax.random.key(0)), shape, incomplete)
        make_tiny.tokenizer().save_pretrained(str(incomplete))
        incomplete.rename(home / "hf")
    config = SftConfig(
        model=str(home / "hf"),
        examples=str(home / "solutions.jsonl"),
        steps=size.sft_steps,
        examples_per_step=4 * size.prompts,
        policy=Optimizer(learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=20),
        packing=Packing(rows=8, row_length=256),
        saving=Saving(every=size.sft_steps, keep=1),
    )
    train_sft(config, home / "start", screen)
    return home / "start"


def make_config(home: Path, row: str, seed: int, steps: int, size: Size) -> TrainConfig:
    """Return the config of a row; rows differ in the loss and the models it needs.

    As published, a ninth of the steps trains the token reward model alone.
    """
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
    """Return the mean accuracy over several samples of each held-out problem."""
    trained = load_model(run, dtype="float32")
    engine = trained.make_engine(rows=size.slots)
    evaluator = Evaluator(
        engine=engine,
        weights=engine.weights(trained.params),
        chat=trained.chat,
        pool=pool,
        screen=Screen.silent(),
    )
    sets, sampling = (
        [ProblemSet("heldout", read_prompts(prompts))],
        Sampling(max_tokens=8),
    )
    return evaluator.reports(sets, None, sampling, size.samples)["heldout"].accuracy


def run_all(
    home: Path, seeds: int, steps: int, size: Size, screen: Screen
) -> tuple[float, list[Result]]:
    """Return the accuracies of the start and of each row, from files if they exist."""
    home.mkdir(parents=True, exist_ok=True)
    prompts = home / "heldout.jsonl"
    results: dict[str, dict[int, float]] = {row: {} for row in ROWS}
    quiet = Screen(Console(file=(home / "log.txt").open("a"), highlight=False))
    with Pool(1) as pool:
        start = make_start(home, size, quiet)
        baseline = load_or_compute(
            home / "start.json", lambda: measure(start, prompts, size, pool)
        )
        screen.log(f"start: {baseline:.1%} correct")
        with screen.phase("runs", total=seeds * len(ROWS)) as advance:
            for seed in range(seeds):
                for row in ROWS:
                    run = home / f"{row}_{steps}_steps" / f"seed_{seed}"

                    def accuracy(row=row, seed=seed, run=run) -> float:
                        config = make_config(home, row, seed, steps, size)
                        train_oreal(config, run, quiet)
                        return measure(run, prompts, size, pool)

                    value = load_or_compute(run.with_suffix(".json"), accuracy)
                    results[row][seed] = value
                    screen.log(f"{row}, seed {seed}: {value:.1%}")
                    advance()
    return baseline, [Result(row, by_seed) for row, by_seed in results.items()]


def load_or_compute(path: Path, compute: Callable[[], float]) -> float:
    """Return the accuracy in a file; compute and write it if there is none."""
    if path.exists():
        return json.loads(path.read_text())["accuracy"]
    value = compute()
    write_text(path, json.dumps({"accuracy": value}) + "\n")
    return value


def ladder_steps(results: Sequence[Result]) -> list[tuple[str, str, tuple, str]]:
    """Return each step up the ladder: from, to, interval of paired gains, verdict."""
    by_row = {result.row: result.by_seed for result in results}
    steps = []
    pairs = [
        *zip(losses.presets.LADDER, losses.presets.LADDER[1:], strict=False),
        ("behaviour_cloning", "released"),
    ]
    for below, above in pairs:
        seeds = by_row[below].keys() & by_row[above].keys()
        gains = [by_row[above][seed] - by_row[below][seed] for seed in sorted(seeds)]
        mean, low, high = interval(gains)
        steps.append((below, above, (mean, low, high), verdict(low, high)))
    return steps


def report(
    home: Path, baseline: float, results: Sequence[Result], steps: int, screen: Screen
) -> None:
    """Print the tables; write all numbers to a JSON file, and a plot."""
    rows = Table(title=f"{steps} steps from {baseline:.1%}")
    for name in ("row", "seeds", "correct", "95% interval"):
        rows.add_column(name, justify="left" if name == "row" else "right")
    for result in results:
        mean, low, high = result.interval()
        span = f"{low:.1%} to {high:.1%}"
        rows.add_row(result.row, str(len(result.by_seed)), f"{mean:.1%}", span)
    rungs = Table(title="steps of the ladder")
    for name in ("from", "to", "gain, points", "95% interval", "verdict"):
        rungs.add_column(name)
    for below, above, (mean, low, high), outcome in ladder_steps(results):
        span = f"{100 * low:+.1f} to {100 * high:+.1f}"
        rungs.add_row(below, above, f"{100 * mean:+.1f}", span, outcome)
    screen.console.print(rows)
    screen.console.print(rungs)
    numbers = {
        "start": baseline,
        "rows": {result.row: result.by_seed for result in results},
        "steps": [
            {"from": below, "to": above, "gain": gain, "verdict": outcome}
            for below, above, gain, outcome in ladder_steps(results)
        ],
    }
    write_text(
        home / f"results_{steps}_steps.json", json.dumps(numbers, indent=1) + "\n"
    )
    plot(home / f"ablation_{steps}_steps.png", baseline, results)


def plot(picture: Path, baseline: float, results: Sequence[Result]) -> None:
    """Plot each run as a dot, and each row's mean and interval."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panel = figure.subplots()
    for x, result in enumerate(results):
        mean, low, high = (100 * value for value in result.interval())
        dots = [100 * value for value in result.by_seed.values()]
        panel.plot([x] * len(dots), dots, "o", color="tab:gray", alpha=0.5)
        panel.errorbar(
            x + 0.15, mean, [[mean - low], [high - mean]], fmt="s", capsize=4
        )
    panel.axhline(100 * baseline, color="black", linestyle=":", label="start")
    panel.set_xticks(
        range(len(results)), [result.row.replace("_", "\n") for result in results]
    )
    panel.set_ylabel("correct on held-out problems, %")
    panel.legend()
    figure.savefig(picture, dpi=120)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("directory", type=Path)
    options.add_argument("--seeds", type=int, default=8, help="runs of each row")
    options.add_argument("--steps", type=int, default=18, help="steps of each run")
    options.add_argument(
        "--smoke",
        action="store_true",
        help="quick check with two seeds, few steps and problems",
    )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; return the exit code."""
    args = parser().parse_args(arguments)
    screen = Screen()
    size = SMOKE if args.smoke else FULL
    if args.smoke:
        args.seeds, args.steps = 2, 9
    try:
        if args.seeds < 2:
            raise InputError(f"--seeds {args.seeds}: an interval needs at least 2")
        if args.steps < 9:
            raise InputError(f"--steps {args.steps}: must be at least 9")
        cache = args.directory / "compiled"  # runs of a row share their programs
        jax.config.update("jax_compilation_cache_dir", str(cache.resolve()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        baseline, results = run_all(
            args.directory, args.seeds, args.steps, size, screen
        )
        report(args.directory, baseline, results, args.steps, screen)
    except InputError as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ablation: interrupted; resume with the same command", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    exit_process(main())
