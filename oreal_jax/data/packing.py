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

from oreal_jax.errors import InputError
from oreal_jax.shapes import bucket


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


class Shape(NamedTuple):
    """The sizes of a batch beyond those of its rows: M, C, N, T."""

    micros: int
    columns: int
    completions: int
    tokens: int


class Limits(NamedTuple):
    """Upper bounds for every step of a run: completions, tokens of a prompt with its
    completion, tokens of a completion; and the tokens of the shortest prompt."""

    completions: int
    sequence: int
    completion: int
    shortest_prompt: int = 0

    @classmethod
    def of(cls, examples: Sequence[Example], completions: int) -> "Limits":
        """The limits of batches of `completions` examples out of these."""
        longest = max(len(e.completion) for e in examples)
        return cls(
            completions,
            max(len(e.prompt) + len(e.completion) for e in examples),
            longest,
            # In proportion to the longest completion: the largest share of a row.
            int(longest * min(len(e.prompt) / len(e.completion) for e in examples)),
        )

    def shape(self, rows: int, row_length: int) -> Shape:
        """A shape that fits nearly every batch, so that few shapes are compiled.

        It does not depend on earlier batches: a resumed run uses the same.
        """
        # Each row but the last has at least this many sequences.
        per_row = max(1, row_length // self.sequence)
        worst = bucket(-(-self.completions // (per_row * rows)))
        per_micro_batch = bucket(8 * rows * row_length // self.sequence, 16)
        # The share of completions is largest in a row of the shortest prompts.
        sequence = max(1, self.completion + self.shortest_prompt)
        predicted = -(-row_length * self.completion // sequence)
        return Shape(
            # Empty micro-batches and completions cost only memory.
            micros=max(1, worst // 2),
            columns=_columns(predicted, row_length),
            completions=min(per_micro_batch, bucket(self.completions, 8)),
            tokens=_tokens(self.completion),
        )


class Slot(NamedTuple):
    """Where an example went: micro-batch and place in it."""

    micro: int
    place: int


def fill_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Assigns sequences to rows, longest first, each to the first row with room.

    Raises:
        InputError: a sequence is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        need = lengths[index]
        if need > row_length:
            raise InputError(f"a sequence of {need} tokens, row_length={row_length}")
        place = next((i for i, left in enumerate(room) if left >= need), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(row_length)
        rows[place].append(index)
        room[place] -= need
    return rows


def _columns(predicted: int, row_length: int) -> int:
    """Eighths of a row, not powers of two: the vocabulary head pays for each."""
    eighth = max(16, bucket(row_length) // 8)
    return eighth * max(1, -(-predicted // eighth))


def _tokens(longest: int) -> int:
    return bucket(longest, 16) if longest <= 128 else 128 * -(-longest // 128)


def arrange(
    lengths: Sequence[tuple[int, int]],
    *,
    rows: int,
    row_length: int,
    limits: Limits | None = None,
) -> tuple[list[list[list[int]]], Shape]:
    """Assigns sequences of (prompt, completion) lengths to the rows of micro-batches.

    Returns the sequences of each row of each micro-batch, and the shape of the batch.
    """
    packed = fill_rows([prompt + answer for prompt, answer in lengths], row_length)
    groups = [packed[i : i + rows] for i in range(0, len(packed), rows)]
    predicted = (sum(lengths[i][1] for i in row) for row in packed)
    shape = Shape(
        micros=bucket(len(groups)),
        columns=_columns(max(predicted, default=1), row_length),
        completions=bucket(max((sum(map(len, g)) for g in groups), default=1), 8),
        tokens=_tokens(max((answer for _, answer in lengths), default=1)),
    )
    if limits:
        shape = Shape(*map(max, shape, limits.shape(rows, row_length)))
    return groups, shape


def pack(
    examples: Sequence[Example],
    *,
    rows: int,
    row_length: int,
    limits: Limits | None = None,
) -> tuple[Batch, list[Slot]]:
    """Packs examples into micro-batches of `rows` rows of `row_length` tokens. Without
    `limits`, the shape depends on these examples alone.

    Returns the batch (reference log-probabilities zero, to be filled in) and the slot
    of each example.
    """
    pairs = [(len(e.prompt), len(e.completion)) for e in examples]
    groups, (M, C, N, T) = arrange(
        pairs, rows=rows, row_length=row_length, limits=limits
    )

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
                size, answer = sum(pairs[index]), pairs[index][1]
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
