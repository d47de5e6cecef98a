"""Texts of tokens whose concatenation is the text of the completion.

A trajectory file has the text of each token decoded by itself. That differs from what
the token adds to the text where a character's bytes are spread over several tokens
(each is U+FFFD by itself), where a tokenizer omits a leading space, for special tokens,
which the text omits, and after a stop string.
"""

import bisect
import itertools
from collections.abc import Sequence

UNKNOWN = "\ufffd"  # stands for one to three bytes of an incomplete character


def align(pieces: Sequence[str], text: str) -> list[str | None] | None:
    """Return what each token adds to `text`; None for a token that it omits.

    A character of several tokens belongs to the one that completes it; the others have
    the text "". Returns None if the pieces do not make up the text.
    """
    content = text.encode(errors="replace")
    # For each number of pieces: where in `content` they may end, and from where the
    # last one then begins.
    states: list[dict[int, int]] = [{0: 0}]
    for piece in pieces:
        ends: dict[int, int] = {}
        for start in states[-1]:
            for end in _ends(piece, content, start):
                ends.setdefault(end, start)
        states.append(ends)
    if len(content) not in states[-1]:
        return None
    limits = [len(content)]
    for state in reversed(states[1:]):
        limits.append(state[limits[-1]])
    letters = list(itertools.accumulate(len(x.encode(errors="replace")) for x in text))
    count = lambda end: bisect.bisect_right(letters, end)
    return [
        None if start == end else text[count(start) : count(end)]
        for start, end in itertools.pairwise(reversed(limits))
    ]


def _ends(piece: str, content: bytes, start: int) -> list[int]:
    """Return where a piece that begins at `start` may end: there if it is omitted."""
    unknown, size = piece.count(UNKNOWN), len(piece.encode(errors="replace"))
    if unknown:
        sizes = range(size - 2 * unknown, min(size, len(content) - start) + 1)
        matches = lambda end: content[start:end].decode(errors="replace") == piece
        return [start + size for size in sizes if matches(start + size)] or [start]
    known = piece.encode(errors="replace")
    if content.startswith(known, start):
        return [start + size]
    if content[start : start + 1].isspace() and content.startswith(known, start + 1):
        return [start + 1 + size]
    # The text ends before a stop string that begins within the token.
    is_cut = len(content) - start < size and known.startswith(content[start:])
    return [len(content)] if is_cut else [start]
