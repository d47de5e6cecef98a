"""Checkpoints of a run: everything that is needed to go on, bit for bit.

A checkpoint has two items. `policy` holds the policy's weights alone, so that sampling,
evaluation and export read nothing else; `trainer` holds the optimizers, the token
reward model and the step. Data order and random numbers are functions of (seed, step),
so the step is all there is to say about them. The reference model is saved once,
beside: a run does not depend on the directory it started from.

    RUN/model/                    config.json, tokenizer, chat template
    RUN/checkpoints/<step>/       policy, trainer
    RUN/reference/                weights of the initial policy
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from oreal_jax.errors import BadInput
from oreal_jax.model import Params
from oreal_jax.train.state import Player, TrainState

logging.getLogger("absl").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="orbax")


class Checkpoints:
    """The numbered checkpoints of a run directory; saving goes on in the background."""

    def __init__(self, run: Path, *, keep: int | None = None):
        """Opens `run/checkpoints`; the newest `keep` stay (default: all)."""
        self._manager = ocp.CheckpointManager(
            (run / "checkpoints").resolve(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            item_names=("policy", "trainer"),
        )

    def save(self, state: TrainState) -> None:
        """Saves the state under its step, unless that step is there already."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                policy=ocp.args.StandardSave(state.policy.params),
                trainer=ocp.args.StandardSave(_trainer(state)),
            ),
        )

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state saved under `step`, laid out as `abstract` says.

        Raises:
            BadInput: it cannot be read.
        """
        with _readable(Path(self._manager.directory) / str(step)):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    policy=ocp.args.StandardRestore(abstract.policy.params),
                    trainer=ocp.args.StandardRestore(_trainer(abstract)),
                ),
            )
        trainer = restored["trainer"]
        return TrainState(
            step=trainer["step"],
            policy=Player(restored["policy"], trainer["policy_optimizer"]),
            token_reward=Player(*trainer["token_reward"])
            if "token_reward" in trainer
            else None,
        )

    def close(self) -> None:
        """Waits for what is being saved."""
        self._manager.wait_until_finished()
        self._manager.close()


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


def steps(run: Path) -> list[int]:
    """The steps of which a run has whole checkpoints, in order."""
    found = (run / "checkpoints").glob("*/policy")
    return sorted(int(p.parent.name) for p in found if p.parent.name.isdigit())


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
