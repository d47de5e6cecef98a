"""Trajectories as a run has written them, read back and checked line by line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from oreal_jax.errors import InputError
from oreal_jax.files import read_rows
from oreal_jax.verify.verdict import read_outcome

# Lists with one number a token, in the order of `Scored`.
LISTS = (
    "log_probs",
    "old_log_probs",
    "reference_log_probs",
    "token_scores",
    "entropy",
)


class Recorded(NamedTuple):
    """A completion of T tokens that was learned from.

    `rewards` are those (+1, -1) of all samples of its group, learned from or not; its
    own is `rewards[place]`. `lists` has the rows of `LISTS`; `full_log_probs` are in
    runs with `log_probs="sampled"` alone.
    """

    name: str
    pieces: list[str]
    rewards: Float[np.ndarray, "K"]
    place: int
    lists: Float[np.ndarray, "5 T"]
    full_log_probs: Float[np.ndarray, "T"] | None = None

    @property
    def correct(self) -> bool:
        """Whether it was judged correct."""
        return bool(self.rewards[self.place] > 0)


def read(paths: Sequence[Path]) -> list[Recorded]:
    """The completions learned from in files or folders of them, as one batch.

    Lines without per-token lists count as samples of their group. A group is what has
    the same file, `step` and `group` (where there is no `group`, the same `id`).

    Raises:
        InputError: naming file, line, field and value; or nothing was learned from.
    """
    recorded: list[Recorded] = []
    for path in paths:
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise InputError(f"{path}: no .jsonl files in this directory")
        for file in files:
            recorded += _read_file(file)
    if not recorded:
        raise InputError(
            f"{', '.join(map(str, paths))}: no completion with per-token lists "
            f"({', '.join(LISTS)}); runs write them for what they learn from"
        )
    return recorded


def choose(recorded: Sequence[Recorded], names: Sequence[str]) -> list[int]:
    """Where the completions of these names are; without names, one correct and one
    incorrect.

    Raises:
        InputError: there is none of a name.
    """
    places = {trajectory.name: i for i, trajectory in enumerate(recorded)}
    for name in names:
        if name not in places:
            some = ", ".join(list(places)[:5])
            raise InputError(
                f"--trajectory {name}: not among the {len(places)} completions "
                f"learned from: {some}, ..."
            )
    if names:
        return [places[name] for name in names]
    correct = [i for i, trajectory in enumerate(recorded) if trajectory.correct]
    incorrect = [i for i, trajectory in enumerate(recorded) if not trajectory.correct]
    return correct[:1] + incorrect[:1]


def _read_file(file: Path) -> list[Recorded]:
    rewards: dict[tuple, list[float]] = {}
    members = []
    for where, row in read_rows(file):
        outcome = read_outcome(where, row)
        group = (row.get("step"), row.get("group", row.get("id")))
        of_group = rewards.setdefault(group, [])
        of_group.append(1.0 if outcome == "correct" else -1.0)
        if "log_probs" in row:
            lists = _lists(where, row, LISTS)
            full = "full_log_probs"
            full = _lists(where, row, (full,))[0] if full in row else None
            members.append((group, len(of_group) - 1, row, lists, full))
    return [
        Recorded(
            name=f"{row.get('step', 0)}/{row.get('id', '')}/{row.get('sample', place)}",
            pieces=_pieces(row, lists.shape[1]),
            rewards=np.array(rewards[group]),
            place=place,
            lists=lists,
            full_log_probs=full,
        )
        for group, place, row, lists, full in members
    ]


def _lists(
    where: str, row: dict[str, Any], names: Sequence[str]
) -> Float[np.ndarray, "_ T"]:
    size = len(row["log_probs"]) if isinstance(row["log_probs"], list) else 0
    if not size:
        raise InputError(f"{where}: field 'log_probs' is not a list of numbers")
    for name in names:
        values = row.get(name)
        if not isinstance(values, list):
            raise InputError(f"{where}: field {name!r} is {values!r}, expected a list")
        if len(values) != size:
            raise InputError(
                f"{where}: field {name!r} has {len(values)} numbers, "
                f"'log_probs' has {size}"
            )
    try:
        lists = np.array([row[name] for name in names], np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: per-token lists are not numbers: {error}") from None
    if not np.isfinite(lists).all():
        name = names[int(np.argmin(np.isfinite(lists).all(axis=1)))]
        raise InputError(f"{where}: field {name!r} holds numbers that are not finite")
    return lists


def _pieces(row: dict[str, Any], size: int) -> list[str]:
    """The text of each token; its number where the file does not say."""
    pieces = row.get("pieces")
    if not isinstance(pieces, list) or len(pieces) != size:
        return [str(i) for i in range(size)]
    return [str(piece) for piece in pieces]
