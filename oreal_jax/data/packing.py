"""Trajectories to fixed shapes: short sequences share a row, told apart by segment.

Only completion tokens are predicted, so each row lists the columns that predict one
(`predicts`) and the vocabulary head visits nothing else. A completion then is a stretch
of that list, and losses see one row per completion, however it was packed.

Letters: M micro-batches, R rows each, S tokens a row, C predicting columns a row,
N completions a micro-batch, T tokens a completion.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from oreal_jax.errors import BadInput


class Example(NamedTuple):
    """A prompt, a completion, and what the verdict made of it.

    `old_log_probs` are those of the policy that drew the completion, one a token; None
    where nobody drew it (they then count as 0).
    """

    prompt: Sequence[int]
    completion: Sequence[int]
    correct: bool = True
    advantage: float = 1.0
    old_log_probs: np.ndarray | None = None


class Batch(NamedTuple):
    """M micro-batches, of which the first `filled` are real.

    `row`, `first` and `length` place a completion: its tokens are entries
    first .. first + length - 1 of its row's predicting columns. Length 0 is padding.
    """

    filled: Int[Any, ""]
    tokens: Int[Any, "M R S"]
    positions: Int[Any, "M R S"]
    segments: Int[Any, "M R S"]
    predicts: Int[Any, "M R C"]
    targets: Int[Any, "M R C"]
    row: Int[Any, "M N"]
    first: Int[Any, "M N"]
    length: Int[Any, "M N"]
    correct: Bool[Any, "M N"]
    advantage: Float[Any, "M N"]
    old_log_probs: Float[Any, "M N T"]
    reference_log_probs: Float[Any, "M N T"]

    def completion(self) -> Bool[Array, "M N T"]:
        """True at the tokens that exist."""
        T = self.reference_log_probs.shape[-1]
        return jnp.arange(T)[None, None] < self.length[..., None]


class Slot(NamedTuple):
    """Where an example went: micro-batch and place in it."""

    micro: int
    place: int


def bucket(size: int, smallest: int = 1) -> int:
    """The next power of two: few distinct shapes, so few compilations."""
    return max(smallest, 1 << max(0, size - 1).bit_length())


def fill_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Assigns sequences to rows, longest first, each to the first row with room.

    Raises:
        BadInput: a sequence is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        need = lengths[index]
        if need > row_length:
            raise BadInput(f"a sequence of {need} tokens, row_length={row_length}")
        place = next((i for i, left in enumerate(room) if left >= need), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(row_length)
        rows[place].append(index)
        room[place] -= need
    return rows


def pack(
    examples: Sequence[Example], *, rows: int, row_length: int
) -> tuple[Batch, list[Slot]]:
    """Packs examples into micro-batches of `rows` rows of `row_length` tokens.

    Returns the batch (reference log-probabilities zero, to be filled in) and the slot
    of each example.
    """
    lengths = [len(e.prompt) + len(e.completion) for e in examples]
    packed = fill_rows(lengths, row_length)
    groups = [packed[i : i + rows] for i in range(0, len(packed), rows)]
    predicted = lambda indices: sum(len(examples[i].completion) for i in indices)
    M = bucket(len(groups))
    # The vocabulary head pays for every column: eighths of a row, not powers of two.
    eighth = max(16, bucket(row_length) // 8)
    C = eighth * max(1, -(-max(map(predicted, packed), default=1) // eighth))
    N = bucket(max((sum(map(len, group)) for group in groups), default=1), 8)
    T = bucket(max((len(e.completion) for e in examples), default=1), 16)

    whole = lambda *shape: np.zeros(shape, np.int32)
    batch = Batch(
        filled=np.asarray(len(groups), np.int32),
        tokens=whole(M, rows, row_length),
        positions=whole(M, rows, row_length),
        segments=whole(M, rows, row_length),
        predicts=whole(M, rows, C),
        targets=whole(M, rows, C),
        row=whole(M, N),
        first=whole(M, N),
        length=whole(M, N),
        correct=np.zeros((M, N), bool),
        advantage=np.zeros((M, N), np.float32),
        old_log_probs=np.zeros((M, N, T), np.float32),
        reference_log_probs=np.zeros((M, N, T), np.float32),
    )
    slots = [Slot(0, 0)] * len(examples)
    for micro, group in enumerate(groups):
        place = 0
        for row, indices in enumerate(group):
            column = listed = 0
            for segment, index in enumerate(indices, start=1):
                example = examples[index]
                size, answer = lengths[index], len(example.completion)
                here = (micro, row, slice(column, column + size))
                batch.tokens[here] = [*example.prompt, *example.completion]
                batch.positions[here] = np.arange(size)
                batch.segments[here] = segment
                there = (micro, row, slice(listed, listed + answer))
                # The state of token t - 1 predicts token t.
                batch.predicts[there] = np.arange(answer) + column + size - answer - 1
                batch.targets[there] = example.completion
                batch.row[micro, place] = row
                batch.first[micro, place] = listed
                batch.length[micro, place] = answer
                batch.correct[micro, place] = example.correct
                batch.advantage[micro, place] = example.advantage
                if example.old_log_probs is not None:
                    batch.old_log_probs[micro, place, :answer] = example.old_log_probs
                slots[index] = Slot(micro, place)
                column, listed, place = column + size, listed + answer, place + 1
    return batch, slots
