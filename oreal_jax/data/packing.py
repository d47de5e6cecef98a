"""Packing of trajectories into fixed shapes: short sequences share a row as segments.

Only completion tokens are predicted, so each row lists the columns that predict one
(`predicts`), and the vocabulary head computes no others. A completion is a range of
that list, and losses see one row per completion, independent of the packing.

Letters: M micro-batches of R rows of S tokens, C predicting columns per row, N
completions per micro-batch, T tokens per completion.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from oreal_jax.errors import InputError
from oreal_jax.shapes import bucket


class Example(NamedTuple):
    """A prompt, a completion, its verdict and advantage.

    `old_log_probs` are those of the policy that generated the completion, one per
    token; None (for solutions from a file) counts as 0.
    """

    prompt: Sequence[int]
    completion: Sequence[int]
    correct: bool = True
    advantage: float = 1.0
    old_log_probs: np.ndarray | None = None


class Batch(NamedTuple):
    """M micro-batches, of which the first `filled` are not padding.

    The tokens of a completion are entries first .. first + length - 1 of the predicting
    columns of its `row`. Length 0 is padding.
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
        """Return the mask of completion tokens."""
        T = self.reference_log_probs.shape[-1]
        return jnp.arange(T)[None, None] < self.length[..., None]


class BatchIndex(NamedTuple):
    """The position of an example in a batch: indices along M and N."""

    micro_batch: int
    completion: int


class Shape(NamedTuple):
    """The sizes of a batch other than those of its rows: M, C, N, T."""

    micros: int
    columns: int
    completions: int
    tokens: int


class SizeLimits(NamedTuple):
    """Upper bounds for every step of a run.

    Completions, tokens of a prompt with its completion, tokens of a completion; and
    the tokens of the shortest prompt.
    """

    completions: int
    sequence: int
    completion: int
    shortest_prompt: int = 0

    @classmethod
    def from_examples(
        cls, examples: Sequence[Example], completions: int
    ) -> "SizeLimits":
        """Return the limits of batches of `completions` of these examples."""
        longest = max(len(e.completion) for e in examples)
        # In proportion to the longest completion: the largest share of a row.
        prompt_share = min(len(e.prompt) / len(e.completion) for e in examples)
        sequence = max(len(e.prompt) + len(e.completion) for e in examples)
        return cls(completions, sequence, longest, int(longest * prompt_share))

    def shape(self, rows: int, row_length: int) -> Shape:
        """Return a shape that fits nearly every batch, so that few are compiled.

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


def _columns(predicted: int, row_length: int) -> int:
    """Round up to eighths of a row: the vocabulary head computes every column."""
    eighth = max(16, bucket(row_length) // 8)
    return eighth * max(1, -(-predicted // eighth))


def _tokens(longest: int) -> int:
    return bucket(longest, 16) if longest <= 128 else 128 * -(-longest // 128)


def fill_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Assign sequences to rows, longest first, each to the first row with space.

    Raises:
        InputError: a sequence is longer than a row.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        size = lengths[index]
        if size > row_length:
            raise InputError(f"a sequence of {size} tokens, row_length={row_length}")
        row = next((i for i, space in enumerate(free) if space >= size), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(row_length)
        rows[row].append(index)
        free[row] -= size
    return rows


def arrange(
    lengths: Sequence[tuple[int, int]],
    *,
    rows: int,
    row_length: int,
    limits: SizeLimits | None = None,
) -> tuple[list[list[list[int]]], Shape]:
    """Assign sequences of (prompt, completion) lengths to the rows of micro-batches.

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
    limits: SizeLimits | None = None,
) -> tuple[Batch, list[BatchIndex]]:
    """Pack examples into micro-batches of `rows` rows of `row_length` tokens.

    Returns the batch, with reference log-probabilities 0, and the position of each
    example. Without `limits`, the shape depends only on these examples.
    """
    sizes = [(len(e.prompt), len(e.completion)) for e in examples]
    groups, (M, C, N, T) = arrange(
        sizes, rows=rows, row_length=row_length, limits=limits
    )
    zeros = lambda *shape, dtype="int32": np.zeros((M, *shape), dtype)
    batch = Batch(
        filled=np.asarray(len(groups), np.int32),
        tokens=zeros(rows, row_length),
        positions=zeros(rows, row_length),
        segments=zeros(rows, row_length),
        predicts=zeros(rows, C),
        targets=zeros(rows, C),
        row=zeros(N),
        first=zeros(N),
        length=zeros(N),
        correct=zeros(N, dtype="bool"),
        advantage=zeros(N, dtype="float32"),
        old_log_probs=zeros(N, T, dtype="float32"),
        reference_log_probs=zeros(N, T, dtype="float32"),
    )
    indices = [BatchIndex(0, 0)] * len(examples)
    for micro_batch, group in enumerate(groups):
        count = 0  # completions of this micro-batch so far
        for row, members in enumerate(group):
            column = first = 0
            for segment, member in enumerate(members, start=1):
                example, (prompt, answer) = examples[member], sizes[member]
                end = column + prompt + answer
                tokens = (micro_batch, row, slice(column, end))
                batch.tokens[tokens] = [*example.prompt, *example.completion]
                batch.positions[tokens] = np.arange(prompt + answer)
                batch.segments[tokens] = segment
                predicted = (micro_batch, row, slice(first, first + answer))
                # The state of token t - 1 predicts token t.
                batch.predicts[predicted] = np.arange(end - answer - 1, end - 1)
                batch.targets[predicted] = example.completion
                index = BatchIndex(micro_batch, count)
                batch.row[index] = row
                batch.first[index] = first
                batch.length[index] = answer
                batch.correct[index] = example.correct
                batch.advantage[index] = example.advantage
                if example.old_log_probs is not None:
                    batch.old_log_probs[index][:answer] = example.old_log_probs
                indices[member] = index
                column, first, count = end, first + answer, count + 1
    return batch, indices
