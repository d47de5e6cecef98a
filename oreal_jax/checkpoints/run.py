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
of its items: neither counts as a checkpoint, and resuming removes both.
"""

import contextlib
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orbax.checkpoint as ocp

from oreal_jax.errors import BadInput
from oreal_jax.model import Params
from oreal_jax.train.state import Player, TrainState

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
        """Waits for what is being saved."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being saved, and closes."""
        self.wait()
        self._manager.close()


def restore(run: Path, step: int, abstract: TrainState) -> TrainState:
    """The state of a checkpoint, laid out as `abstract` says.

    Raises:
        BadInput: it cannot be read.
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
        policy=Player(items["policy"], trainer["policy_optimizer"]),
        token_reward=Player(*trainer["token_reward"])
        if "token_reward" in trainer
        else None,
    )


def read_progress(run: Path, step: int) -> Progress | None:
    """The progress that a checkpoint records; None in one of before there were any.

    Raises:
        BadInput: it cannot be read.
    """
    if not (run / "checkpoints" / str(step) / "progress").is_dir():
        return None
    items = _restore(run, step, progress=ocp.args.JsonRestore())
    return Progress(**items["progress"])


def _restore(run: Path, step: int, **items: ocp.args.CheckpointArgs) -> Any:
    directory = run / "checkpoints"
    with (
        _readable(directory / str(step)),
        ocp.CheckpointManager(
            directory.resolve(),
            options=ocp.CheckpointManagerOptions(read_only=True),
            item_names=tuple(items),
        ) as manager,
    ):
        return manager.restore(step, args=ocp.args.Composite(**items))


@contextlib.contextmanager
def _readable(directory: Path) -> Iterator[None]:
    """Names the checkpoint that cannot be read; Orbax raises all kinds of errors."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(f"{directory}: cannot be read: {reason}") from None


def _trainer(state: TrainState) -> dict[str, Any]:
    """All of the state but the policy's weights, as a dict without empty entries."""
    trainer = {"step": state.step, "policy_optimizer": state.policy.optimizer}
    if state.token_reward:
        trainer["token_reward"] = tuple(state.token_reward)
    return trainer


ITEMS = ("policy", "trainer")  # what a run needs to resume


def steps(run: Path, items: Sequence[str] = ("policy",)) -> list[int]:
    """The steps of the checkpoints of a run that have all of these items, in order."""
    return [
        step
        for step, directory in _directories(run)
        if not missing_items(directory, items)
    ]


def incomplete(run: Path) -> list[tuple[Path, list[str]]]:
    """The checkpoints of a run that it cannot resume from, with what they lack."""
    lacking = [(each, missing_items(each, ITEMS)) for _, each in _directories(run)]
    return [(directory, items) for directory, items in lacking if items]


def missing_items(directory: Path, items: Sequence[str]) -> list[str]:
    """The items that a checkpoint lacks, or has no whole copy of."""
    return [name for name in items if not (directory / name / "_METADATA").is_file()]


def remove_unfinished(run: Path) -> None:
    """Removes incomplete checkpoints, and what killed saves have left elsewhere: Orbax
    would take the first for checkpoints, and never remove the others."""
    for directory, _ in incomplete(run):
        shutil.rmtree(directory)
    for directory in run.glob("reference.orbax-checkpoint-tmp*"):
        shutil.rmtree(directory)


def _directories(run: Path) -> list[tuple[int, Path]]:
    """Every directory with a step's name."""
    directories = (run / "checkpoints").glob("*")
    return sorted((int(d.name), d) for d in directories if d.name.isdigit())


def newest_policy(run: Path) -> Path:
    """The directory of the newest policy weights of a run.

    Raises:
        BadInput: there is none.
    """
    done = steps(run)
    if not done:
        raise BadInput(f"{run}: no checkpoint in {run / 'checkpoints'}")
    return run / "checkpoints" / str(done[-1]) / "policy"


def save_params(directory: Path, params: Params) -> None:
    """Saves a parameter tree alone."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.resolve(), params)


def load_params(directory: Path, abstract: Params) -> Params:
    """Loads a parameter tree in the types and shardings of `abstract`.

    Raises:
        BadInput: it cannot be read.
    """
    with _readable(directory), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(directory.resolve(), abstract)
