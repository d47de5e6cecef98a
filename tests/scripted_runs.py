"""Runs whose policy is scripted, for tests of resuming and of ends by errors.

The policy learns only where that matters: a step without a pair compiles nothing. The
fixtures `policy` and `files` are in conftest.py.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from scripted import Script, write_lines
from tiny_runs import ROOT, Result, oreal_in_process

from oreal_jax.checkpoints import run as checkpoints

COUNT, EXAM = 24, range(90, 94)
RIGHT = "99"


class Policy:
    """Solves `score` problems of an exam, odd samples of "max A 99?" if it `learns`.

    `error` is raised when step `fails_at` is sampled.
    """

    def __init__(self, model: Path):
        self.script = Script(model, self.answer)
        self.learns, self.score = False, 1
        self.fails_at, self.error = -1, RuntimeError("a bug")

    def answer(self, a: int, sample: int) -> str:
        correct = a - EXAM[0] < self.score if a in EXAM else self.learns and sample % 2
        return RIGHT if correct else str(a)

    def sample(self, engine, *given, step=0, **named):
        if step == self.fails_at:
            raise self.error
        return self.script.sample(engine, *given, step=step, **named)

    def take_prompts(self) -> list[int]:
        """Return the prompts sampled since the last call, in order."""
        asked = self.script.requests
        self.script.requests = []
        return [a for a, sample, _ in asked if sample == 0 and a not in EXAM]


def write_files(folder: Path) -> Path:
    """Write prompts, solutions and an exam; return the folder."""
    question = lambda a: {"question": f"max {a} 99?"}
    numbers = range(10, 10 + COUNT)
    for name, rows in {
        "prompts": [question(a) | {"gold_answer": RIGHT} for a in numbers],
        "solutions": [question(a) | {"solution": f"\\boxed{{{a}}}"} for a in numbers],
        "exam": [question(a) | {"gold_answer": RIGHT} for a in EXAM],
    }.items():
        write_lines(folder / f"{name}.jsonl", rows)
    return folder


def run_verb(
    verb: str, config: Path, run: Path, settings: Sequence[str], *options: str
) -> Result:
    flags = [word for setting in settings for word in ("--set", setting)]
    return oreal_in_process(verb, config, *flags, "--run", run, *options)


def train(
    start: Path,
    files: Path,
    *settings: str,
    run: str = "run",
    options: Sequence[str] = (),
) -> Result:
    own = [f"model={start / 'hf'}", f"prompts={files / 'prompts.jsonl'}"]
    own += ["prompts_per_step=4", "samples_per_prompt=4", "saving.keep=9"]
    # A script has no probabilities, and one program of the update is enough.
    own += ["max_disagreement=2.0", "freeze_steps=0"]
    config = ROOT / "configs/tiny.py"
    return run_verb("train", config, files / run, [*own, *settings], *options)


def sft(start: Path, files: Path, *settings: str, config=ROOT / "configs/tiny_sft.py"):
    own = [f"model={start / 'hf'}", f"examples={files / 'solutions.jsonl'}"]
    own += ["examples_per_step=4", "steps=0", "saving.every=1", "saving.keep=9"]
    return run_verb("sft", config, files / "run", [*own, *settings])


def remove_progress(checkpoint: Path) -> None:
    """Make a checkpoint what it was before progress was recorded."""
    shutil.rmtree(checkpoint / "progress")
    path = checkpoint / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    del metadata["item_handlers"]["progress"]
    path.write_text(json.dumps(metadata))


def saved_steps(run: Path) -> list[int]:
    return checkpoints.steps(run, checkpoints.ITEMS)
