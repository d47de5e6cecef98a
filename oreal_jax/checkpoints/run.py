"""Checkpoints of a run: everything needed to resume it, bit for bit.

    RUN/model/                    config.json, tokenizer, chat template
    RUN/checkpoints/<step>/       policy, trainer, progress
    RUN/reference/                weights of the initial policy

`policy` contains only the policy's weights, for sampling, evaluation and export;
`trainer` the optimizers, the token reward model and the step; `progress` the position
in the data. Random numbers are functions of (seed, step). The reference model is saved
once: a run does not depend on the directory that it started from.

A killed save leaves a temporary directory, an interrupted copy a checkpoint without
some files. A run resumes from the newest complete checkpoint and removes incomplete
ones, but keeps policies of earlier steps, whose `trainer` may be deleted.
"""

import contextlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from oreal_jax.errors import InputError, summarize
from oreal_jax.files import write_text
from oreal_jax.model import Params
from oreal_jax.train_state import ModelState, TrainState

logging.getLogger("absl").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="orbax")

PROGRESS_FILE = "metadata"  # in Orbax's JSON items
# The minimal files of each item: an interrupted copy may have only the first.
FILES = {
    "policy": ("_METADATA", "manifest.ocdbt"),
    "trainer": ("_METADATA", "manifest.ocdbt"),
    "progress": (PROGRESS_FILE,),
}
ITEMS = tuple(FILES)  # what a run needs to resume


class Progress(NamedTuple):
    """The position in the data: `taken` prompts or examples were used.

    `data` and `order` are fingerprints of the data's rows and of the list that steps
    draw from, `rates` the learning rates of the next step by metric name; older
    checkpoints do not record these.
    """

    taken: int = 0
    data: str = ""
    order: str = ""
    rates: Mapping[str, float] = {}


class Checkpoints:
    """The numbered checkpoints of a run directory, saved in the background."""

    def __init__(self, run: Path, *, keep: int | None = None):
        """Open `run/checkpoints` for writing and remove remains of killed saves.

        The newest `keep` checkpoints are kept (default: all).
        """
        self._manager = ocp.CheckpointManager(
            (run / "checkpoints").resolve(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, cleanup_tmp_directories=True
            ),
            item_handlers={
                "policy": _array_handler(),
                "trainer": _array_handler(),
                "progress": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, state: TrainState, progress: Progress) -> None:
        """Save the state under its step, unless that step is already saved."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                policy=ocp.args.PyTreeSave(state.policy.params),
                trainer=ocp.args.PyTreeSave(_trainer(state)),
                progress=ocp.args.JsonSave(progress._asdict()),
            ),
        )

    def wait(self) -> None:
        """Wait for pending saves."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for pending saves and close the manager."""
        self.wait()
        self._manager.close()


def restore(run: Path, step: int, abstract: TrainState) -> TrainState:
    """Return the state of a checkpoint in the types and shardings of `abstract`.

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
    token_reward = trainer.get("token_reward")
    return TrainState(
        step=trainer["step"],
        policy=ModelState(items["policy"], trainer["policy_optimizer"]),
        token_reward=ModelState(*token_reward) if token_reward else None,
    )


def _array_handler() -> ocp.PyTreeCheckpointHandler:
    # With zstd a save takes twice to three times as long, for files a seventh smaller
    # (of trained weights in float32).
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def _trainer(state: TrainState) -> dict[str, Any]:
    """Return the state without the policy's weights, and without empty entries."""
    trainer = {"step": state.step, "policy_optimizer": state.policy.optimizer}
    if state.token_reward:
        trainer["token_reward"] = tuple(state.token_reward)
    return trainer


def read_progress(run: Path, step: int) -> Progress | None:
    """Return the progress of a checkpoint; None in old ones, which do not record it.

    Raises:
        InputError: it cannot be read.
    """
    if not has_progress(run, step):
        return None
    items = _restore(run, step, progress=ocp.args.JsonRestore())
    return Progress(**items["progress"])


def has_progress(run: Path, step: int) -> bool:
    """Return whether a checkpoint records its progress."""
    return _progress_file(run, step).is_file()


def add_progress(run: Path, step: int, progress: Progress) -> None:
    """Record the progress of an old checkpoint."""
    directory = _progress_file(run, step).parent
    scratch = directory.with_name("progress.incomplete")
    write_text(scratch / PROGRESS_FILE, json.dumps(progress._asdict()))
    scratch.rename(directory)


def _progress_file(run: Path, step: int) -> Path:
    return run / "checkpoints" / str(step) / "progress" / PROGRESS_FILE


def _restore(run: Path, step: int, **items: ocp.args.CheckpointArgs) -> Any:
    directory = run / "checkpoints"
    with (
        _readable(directory / str(step), "; if a part of it is missing, remove it"),
        ocp.CheckpointManager(
            directory.resolve(),
            options=ocp.CheckpointManagerOptions(read_only=True),
            item_names=tuple(items),
        ) as manager,
    ):
        return manager.restore(step, args=ocp.args.Composite(**items))


@contextlib.contextmanager
def _readable(directory: Path, advice: str = "") -> Iterator[None]:
    """Name the checkpoint in errors, which Orbax raises in many kinds."""
    try:
        yield
    except Exception as error:
        reason = summarize(error)
        raise InputError(f"{directory}: cannot be read: {reason}{advice}") from None


def steps(run: Path, items: Sequence[str] = ("policy",)) -> list[int]:
    """Return the steps of the checkpoints that have all of these items, in order."""
    return [
        step
        for step, directory in _directories(run)
        if not missing_items(directory, items)
    ]


def newest_step(run: Path, items: Sequence[str] = ("policy",)) -> int | None:
    """Return the last of `steps`, None if there is none."""
    return next(reversed(steps(run, items)), None)


def newest_policy(run: Path) -> Path:
    """Return the directory of a run's newest policy weights.

    Raises:
        InputError: there is none.
    """
    step = newest_step(run)
    if step is None:
        raise InputError(f"{run}: no checkpoint in {run / 'checkpoints'}")
    return run / "checkpoints" / str(step) / "policy"


def missing_items(directory: Path, items: Sequence[str]) -> list[str]:
    """Return the items that a checkpoint lacks, or has only in part."""
    return [
        name
        for name in items
        if not all(_has_content(directory / name / file) for file in FILES[name])
        and not (name == "progress" and _predates_progress(directory))
    ]


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _predates_progress(directory: Path) -> bool:
    """Return whether a checkpoint was saved before progress was recorded."""
    metadata = directory / "_CHECKPOINT_METADATA"  # names the items
    if (directory / "progress").exists() or not _has_content(metadata):
        return False
    return '"progress"' not in metadata.read_text()


def remove_unfinished(run: Path, step: int) -> list[tuple[Path, list[str]]]:
    """Remove remains of killed saves and interrupted copies when resuming from `step`.

    Orbax would read them as checkpoints. Policies of earlier steps are kept.

    Returns:
        The removed checkpoints, each with the items that it lacked.
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
    directories = (run / "checkpoints").glob("*")
    return sorted((int(d.name), d) for d in directories if d.name.isdigit())


def save_params(directory: Path, params: Params) -> None:
    """Save a parameter tree alone."""
    with ocp.Checkpointer(_array_handler()) as checkpointer:
        checkpointer.save(directory.resolve(), args=ocp.args.PyTreeSave(params))


def load_params(directory: Path, abstract: Params) -> Params:
    """Load a parameter tree in the types and shardings of `abstract`.

    Raises:
        InputError: it cannot be read.
    """
    with _readable(directory), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(directory.resolve(), abstract)


def load_token_reward(run: Path, abstract: Params) -> Params:
    """Load the weights of a run's token reward model, without its optimizer state.

    Raises:
        InputError: no checkpoint has one, or it cannot be read.
    """
    step = newest_step(run, ("policy", "trainer"))
    if step is None:
        raise InputError(f"{run}: no checkpoint with trainer state")
    directory = run / "checkpoints" / str(step) / "trainer"
    kind = lambda x: ocp.ArrayRestoreArgs(dtype=x.dtype, sharding=x.sharding)
    select = lambda params: {"token_reward": {"0": params}}
    restore = ocp.args.PyTreeRestore(
        select(abstract),
        restore_args=select(jax.tree.map(kind, abstract)),
        transforms={},  # leave out whatever the selection does not name
    )
    with _readable(directory), ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(directory.resolve(), restore)["token_reward"]["0"]
