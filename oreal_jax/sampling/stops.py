"""Stop tokens, and stop strings as an automaton over tokens that runs on the devices.

A stop string may begin inside one token and end inside another. The Aho-Corasick
automaton (doi:10.1145/360825.360855) over bytes is expanded to whole tokens, so that a
token costs one table lookup.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from oreal_jax.errors import InputError
from oreal_jax.shapes import bucket

START, MATCHED = 0, 1  # states; the others are partial matches


class Stops(NamedTuple):
    """Stop tokens, padded with -1, and the table of stop strings."""

    tokens: Int[Any, "T"]
    table: Int[Any, "V S"]

    @classmethod
    def padded(
        cls, tokens: Sequence[int], table: Int[np.ndarray, "V S"] | None, vocab: int
    ) -> "Stops":
        """Pad to few shapes; without a table no stop string matches."""
        padding = [-1] * (bucket(len(tokens), 8) - len(tokens))
        if table is None:
            table = np.full((vocab, 1), START, np.int32)
        states = table.shape[1]
        table = np.pad(table, ((0, 0), (0, bucket(states) - states)))
        return cls(np.array([*sorted(tokens), *padding], np.int32), table)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of both arrays, on which compiled programs depend."""
        return self.tokens.shape, self.table.shape


def make_stop_table(
    strings: Sequence[str], token_bytes: Callable[[], list[bytes]], vocabulary: int
) -> Int[np.ndarray, "V S"] | None:
    """Return the next state for each token and state, or None if there are no strings.

    `MATCHED` is never left. `token_bytes()` returns the bytes of each token of the
    tokenizer, empty for special tokens; the remaining tokens of the model's
    `vocabulary` are treated as empty.

    Raises:
        InputError: an empty string.
    """
    if "" in strings:
        raise InputError("stop strings: an empty one would end every completion")
    if not strings:
        return None
    pieces = token_bytes()
    by_byte = _byte_table([string.encode() for string in strings])
    table = np.tile(np.arange(len(by_byte), dtype=np.int32), (vocabulary, 1))
    lengths = np.zeros(vocabulary, int)
    lengths[: len(pieces)] = [len(piece) for piece in pieces]
    for index in range(lengths.max(initial=0)):
        tokens = np.flatnonzero(lengths > index).tolist()
        byte = np.array([pieces[token][index] for token in tokens])
        table[tokens] = by_byte[table[tokens], byte[:, None]]
    return table


def _byte_table(strings: Sequence[bytes]) -> Int[np.ndarray, "S 256"]:
    """Return the automaton over bytes.

    The state of a text is its longest suffix that is a proper prefix of a string.
    """
    states = {b"": START}
    for string in strings:
        for length in range(1, len(string)):
            states.setdefault(string[:length], len(states) + 1)
    table = np.full((len(states) + 1, 256), START, np.int32)
    table[MATCHED] = MATCHED
    for prefix, state in states.items():
        for byte in set(b"".join(strings)):
            text = prefix + bytes([byte])
            suffixes = (text[start:] for start in range(len(text) + 1))
            matched = text.endswith(tuple(strings))
            table[state, byte] = (
                MATCHED if matched else next(states[s] for s in suffixes if s in states)
            )
    return table
