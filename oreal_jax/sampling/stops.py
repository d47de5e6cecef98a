"""Stop strings as an automaton over tokens, so that devices can watch for them.

A stop string may begin inside one token and end inside another. The matching state of
Aho and Corasick (doi:10.1145/360825.360855), worked out over bytes, moves by whole
tokens with one look into a table.
"""

import collections
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from oreal_jax.errors import InputError

START, FOUND = 0, 1  # states; the others lie between


def token_table(
    strings: Sequence[str], token_bytes: Callable[[], list[bytes]], vocabulary: int
) -> Int[np.ndarray, "V S"] | None:
    """The state after each token in each state; `FOUND` is never left. None where there
    are no strings.

    `token_bytes()` are the bytes of each token, none for tokens that leave no text;
    tokens beyond them, up to the model's `vocabulary`, have none either.

    Raises:
        InputError: an empty string.
    """
    if "" in strings:
        raise InputError("stop strings: an empty one would end every completion")
    if not strings:
        return None
    pieces = token_bytes()
    by_byte = _byte_table([string.encode() for string in strings])
    S = len(by_byte)
    table = np.tile(np.arange(S, dtype=np.int32), (vocabulary, 1))
    lengths = np.zeros(vocabulary, int)
    lengths[: len(pieces)] = [len(piece) for piece in pieces]
    for place in range(lengths.max(initial=0)):
        tokens = np.flatnonzero(lengths > place).tolist()
        read = np.array([pieces[token][place] for token in tokens])
        table[tokens] = by_byte[table[tokens], read[:, None]]
    return table


def _byte_table(strings: Sequence[bytes]) -> Int[np.ndarray, "S 256"]:
    """The automaton over bytes: a trie whose missing branches lead to where the longest
    suffix that begins a string goes on."""
    trie: list[dict[int, int]] = [{}, {}]
    for string in strings:
        state = START
        for byte in string[:-1]:
            if byte not in trie[state]:
                trie[state][byte] = len(trie)
                trie.append({})
            state = trie[state][byte]
            if state == FOUND:
                break
        if state != FOUND:
            trie[state][string[-1]] = FOUND
    table = np.zeros((len(trie), 256), np.int32)
    table[FOUND] = FOUND
    fallback = [START] * len(trie)
    queue = collections.deque([START])
    while queue:
        state = queue.popleft()
        shorter = table[fallback[state]].copy()  # where a later beginning would be
        table[state] = shorter if state != START else START
        for byte, follows in trie[state].items():
            if follows == FOUND or table[state, byte] == FOUND:
                table[state, byte] = FOUND
                continue
            fallback[follows] = table[state, byte]
            table[state, byte] = follows
            queue.append(follows)
    return table
