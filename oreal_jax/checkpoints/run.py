"""Checkpoints of a run: everything that is needed to resume it, bit for bit.

A checkpoint has three items. `policy` holds the policy's weights alone, so that
sampling, evaluation and export read nothing else; `trainer` holds the optimizers, the
token reward model and the step; `progress` says how far in its data the run is. Random
numbers are functions of (seed, step). The reference model is saved once: a run does not
depend on the directory it started from.

    RUN/model/                    config.json, tokenizer, chat template
    RUN/checkpoints/<step>/       policy, trainer, progress
    RUN/reference/                weights of the initial policy

A killed save leaves a temporary directory, an interrupted copy a checkpoint without all
of its files. A run resumes from the newest complete checkpoint and removes the others,
but not the policies of earlier steps: their `trainer` may be deleted to save space.
"""

import contextlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orbax.checkpoint as ocp

from oreal_jax.errors import InputError
from oreal_jax.files import write_text
from oreal_jax.model import Params
from oreal_jax.train.state import ModelState, TrainState

logging.getLogger("absl").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="orbax")


class Progress(NamedTuple):
    """How far in its data a run is: `taken` prompts or examples were consumed.

    `data` and `order` are fingerprints of the rows of the data and of the list that
    steps take from, `rates` the learning rates of the next step by the name of their
    metric; older checkpoints do not record these.
    """

    taken: int = 0
    data: str = ""
    order: str = ""
    rates: Mapping[str, float] = {}


class Checkpoints:
    """The numbered checkpoints of a run directory; saving goes on in the background."""

    def __init__(self, run: Path, *, keep: int | None = None):
        """Opens `run/checkpoints` for writing, without what killed saves left there;
        the newest `keep` stay (default: all)."""
        self._manager = ocp.CheckpointManager(
            (run / "checkpoints").resolve(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, cleanup_tmp_directories=True
            ),
            item_names=("policy", "trainer", "progress"),
        )

    def save(self, state: TrainState, progress: Progress) -> None:
        """Saves the state under its step, unless that step is there already."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                policy=ocp.args.StandardSave(state.policy.params),
                trainer=ocp.args.StandardSave(_trainer(state)),
                progress=ocp.args.JsonSave(progress._asdict()),
            ),
        )

    def wait(self) -> None:
        """Waits for pending saves."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for pending saves and closes the manager."""
        self.wait()
        self._manager.close()


def restore(run: Path, step: int, abstract: TrainState) -> TrainState:
    """The state of a checkpoint, laid out as `abstract` says.

    Raises:
        InputError: it cannot be read.
    """
    items = _restore(
        run,
        step,
        policy=ocp.args.StandardRestore(abstract.policy.params),
        trainer=ocp.args.StandardRestore(_trainer(abstract)),
    )
    trainer = items["trainer"]
    return TrainState(
        step=trainer["step"],
        policy=ModelState(items["policy"], trainer["policy_optimizer"]),
        token_reward=ModelState(*trainer["token_reward"])
        if "token_reward" in trainer
        else None,
    )


def read_progress(run: Path, step: int) -> Progress | None:
    """The progress that a checkpoint records; None in one of before there were any.

    Raises:
        InputError: it cannot be read.
    """
    if not has_progress(run, step):
        return None
    items = _restore(run, step, progress=ocp.args.JsonRestore())
    return Progress(**items["progress"])


def has_progress(run: Path, step: int) -> bool:
    """Whether a checkpoint records its progress."""
    return _progress_file(run, step).is_file()


def add_progress(run: Path, step: int, progress: Progress) -> None:
    """Records the progress of a checkpoint of before there were any."""
    directory = _progress_file(run, step).parent
    scratch = directory.with_name("progress.incomplete")
    write_text(scratch / PROGRESS_FILE, json.dumps(progress._asdict()))
    scratch.rename(directory)


def _progress_file(run: Path, step: int) -> Path:
    return run / "checkpoints" / str(step) / "progress" / PROGRESS_FILE


def _restore(run: Path, step: int, **items: ocp.args.CheckpointArgs) -> Any:
    directory = run / "checkpoints"
    with (
        _readable(directory / str(step), "if a part of it is missing, remove it"),
        ocp.CheckpointManager(
            directory.resolve(),
            options=ocp.CheckpointManagerOptions(read_only=True),
            item_names=tuple(items),
        ) as manager,
    ):
        return manager.restore(step, args=ocp.args.Composite(**items))


@contextlib.contextmanager
def _readable(directory: Path, advice: str = "") -> Iterator[None]:
    """Names the checkpoint that cannot be read; Orbax raises all kinds of errors."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        message = f"{directory}: cannot be read: {reason}"
        raise InputError("; ".join(filter(None, [message, advice]))) from None


def _trainer(state: TrainState) -> dict[str, Any]:
    """All of the state but the policy's weights, as a dict without empty entries."""
    trainer = {"step": state.step, "policy_optimizer": state.policy.optimizer}
    if state.token_reward:
        trainer["token_reward"] = tuple(state.token_reward)
    return trainer


PROGRESS_FILE = "metadata"  # in Orbax's JSON items
# The files that an item has at least: a copy may have come to the first alone.
FILES = {
    "policy": ("_METADATA", "manifest.ocdbt"),
    "trainer": ("_METADATA", "manifest.ocdbt"),
    "progress": (PROGRESS_FILE,),
}
ITEMS = tuple(FILES)  # what a run needs to resume


def steps(run: Path, items: Sequence[str] = ("policy",)) -> list[int]:
    """The steps of the checkpoints of a run that have all of these items, in order."""
    return [
        step
        for step, directory in _directories(run)
        if not missing_items(directory, items)
    ]


def newest_step(run: Path, items: Sequence[str] = ("policy",)) -> int | None:
    """The last of `steps`, None without."""
    return next(reversed(steps(run, items)), None)


def missing_items(directory: Path, items: Sequence[str]) -> list[str]:
    """The items that a checkpoint lacks, or has no whole copy of."""
    return [
        name
        for name in items
        if not all(_has_content(directory / name / file) for file in FILES[name])
        and not (name == "progress" and _is_without_progress(directory))
    ]


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _is_without_progress(directory: Path) -> bool:
    """Whether a checkpoint was saved before progress was recorded."""
    saved = directory / "_CHECKPOINT_METADATA"  # names the items
    if (directory / "progress").exists() or not _has_content(saved):
        return False
    return '"progress"' not in saved.read_text()


def remove_unfinished(run: Path, step: int) -> list[tuple[Path, list[str]]]:
    """Removes what killed saves and interrupted copies have left in a run that resumes
    after `step`; returns the removed checkpoints, with the items that they lacked.

    Orbax would take these for checkpoints. Policies of earlier steps are kept.
    """
    for directory in run.glob("reference.orbax-checkpoint-tmp*"):
        shutil.rmtree(directory)
    removed = []
    for number, directory in _directories(run):
        missing = missing_items(directory, ITEMS)
        if missing and ("policy" in missing or number > step):
            shutil.rmtree(directory)
            removed.append((directory, missing))
    return removed


def _directories(run: Path) -> list[tuple[int, Path]]:
    """Every directory with a step's name."""
    directories = (run / "checkpoints").glob("*")
    return sorted((int(d.name), d) for d in directories if d.name.isdigit())


def newest_policy(run: Path) -> Path:
    """The directory of the newest policy weights of a run.

    Raises:
        InputError: there is none.
    """
    step = newest_step(run)
    if step is None:
        raise InputError(f"{run}: no checkpoint in {run / 'checkpoints'}")
    return run / "checkpoints" / str(step) / "policy"


def save_params(directory: Path, params: Params) -> None:
    """Saves a parameter tree alone."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.resolve(), params)


def load_params(directory: Path, abstract: Params) -> Params:
    """Loads a parameter tree in the types and shardings of `abstract`.

    Raises:
        InputError: it cannot be read.
    """
    with _readable(directory), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(directory.resolve(), abstract)
