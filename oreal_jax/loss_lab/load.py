"""Saved trajectories, and losses by name, for the loss lab."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from oreal_jax.errors import InputError
from oreal_jax.files import read_rows
from oreal_jax.losses import PolicyLoss, Scored, presets
from oreal_jax.verify.verdict import read_outcome

# Fields with one number per token: log_probs, ..., entropy.
PER_TOKEN = Scored._fields[:5]


class SavedTrajectory(NamedTuple):
    """A completion of T tokens that a run trained on.

    name: STEP/ID/SAMPLE.
    pieces: the text of each token.
    rewards: +1 or -1 of all samples of its group; its own is `rewards[sample_index]`.
    per_token: the fields `PER_TOKEN`, then `full_log_probs`, which differ from
        `log_probs` in runs with `log_probs="sampled"`.
    """

    name: str
    pieces: list[str]
    rewards: Float[np.ndarray, "K"]
    sample_index: int
    per_token: Float[np.ndarray, "6 T"]

    @property
    def correct(self) -> bool:
        """Whether the verdict was correct."""
        return bool(self.rewards[self.sample_index] > 0)

    @property
    def length(self) -> int:
        """The number of tokens."""
        return self.per_token.shape[1]


def load_loss(name: str) -> PolicyLoss:
    """Load a preset by its name, or the loss of a config file.

    Raises:
        InputError: no preset of this name, or not a config file.
    """
    if name.endswith(".py"):
        # These import the models, which presets do not need.
        from oreal_jax.config import TrainConfig
        from oreal_jax.config_loading import load

        return load(Path(name), TrainConfig).loss
    if name not in presets.NAMED:
        raise InputError(
            f"--loss {name}: neither a config file (.py) nor one of "
            f"{', '.join(presets.NAMED)}"
        )
    return presets.NAMED[name]


def load_trajectories(paths: Sequence[Path]) -> list[SavedTrajectory]:
    """Load the completions trained on, from files or directories of them.

    Lines without per-token lists count as samples of their group: lines of a file with
    the same `step` and `group` (without `group`: the same `id`).

    Raises:
        InputError: names file, line, field and value; or no completion trained on.
    """
    trajectories: list[SavedTrajectory] = []
    for path in paths:
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise InputError(f"{path}: no .jsonl files in this directory")
        for file in files:
            trajectories += _load_file(file)
    if not trajectories:
        raise InputError(
            f"{', '.join(map(str, paths))}: no completion with per-token lists "
            f"({', '.join(PER_TOKEN)}); runs write them for completions trained on"
        )
    return trajectories


def select(trajectories: Sequence[SavedTrajectory], names: Sequence[str]) -> list[int]:
    """Return the indices of named completions; without names, of one per outcome.

    Raises:
        InputError: no completion has one of the names.
    """
    if not names:
        correct = [trajectory.correct for trajectory in trajectories]
        return [
            correct.index(outcome) for outcome in (True, False) if outcome in correct
        ]
    indices = {trajectory.name: i for i, trajectory in enumerate(trajectories)}
    for name in names:
        if name not in indices:
            raise InputError(
                f"--trajectory {name}: not among the {len(indices)} completions "
                f"trained on: {', '.join(list(indices)[:5])}, ..."
            )
    return [indices[name] for name in names]


def _load_file(file: Path) -> list[SavedTrajectory]:
    groups: dict[tuple, list[float]] = defaultdict(list)
    trained = []
    for where, row in read_rows(file):
        rewards = groups[row.get("step"), row.get("group", row.get("id"))]
        rewards.append(1.0 if read_outcome(where, row) == "correct" else -1.0)
        if "log_probs" in row:
            index = len(rewards) - 1
            trained.append((row, rewards, index, _per_token(where, row)))
    return [
        SavedTrajectory(
            name=f"{row.get('step', 0)}/{row.get('id', '')}/{row.get('sample', index)}",
            pieces=_pieces(row, per_token.shape[1]),
            rewards=np.array(rewards),
            sample_index=index,
            per_token=per_token,
        )
        for row, rewards, index, per_token in trained
    ]


def _per_token(where: str, row: dict[str, Any]) -> Float[np.ndarray, "6 T"]:
    """Check and read the lists of a row; `where` is its file and line."""
    row.setdefault("full_log_probs", row["log_probs"])
    arrays = []
    for name in (*PER_TOKEN, "full_log_probs"):
        try:
            arrays.append(np.array(row.get(name), np.float32))
        except (TypeError, ValueError):
            arrays.append(np.array(np.nan))
        shape, finite = arrays[-1].shape, np.isfinite(arrays[-1]).all()
        if not finite or len(shape) != 1 or not 0 < shape[0] == arrays[0].size:
            raise InputError(
                f"{where}: field {name!r} is {row.get(name)!r:.60}, expected a list of "
                "finite numbers, one per token"
            )
    return np.stack(arrays)


def _pieces(row: dict[str, Any], size: int) -> list[str]:
    """Return the text of each token; its number if the file has no texts."""
    pieces = row.get("pieces")
    if not isinstance(pieces, list) or len(pieces) != size:
        pieces = range(size)
    return [str(piece) for piece in pieces]
