"""Texts of tokens whose concatenation is the text of the completion.

A trajectory file has the text of each token decoded by itself. That differs from what
the token adds to the text where a character's bytes are spread over several tokens
(each is U+FFFD by itself), where a tokenizer omits a leading space, for special tokens,
which the text omits, and after a stop string.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from oreal_jax.errors import InputError

UNKNOWN = "\ufffd"  # bytes that are no character by themselves
# Returns the texts of a run of such tokens, from the text of the run; None if unknown.
Splitter = Callable[[str, Sequence[str]], list[str] | None]


def align(
    pieces: Sequence[str], text: str, split: Splitter = lambda text, pieces: None
) -> list[str | None] | None:
    """Return what each token adds to `text`; None for a token that it omits.

    Without `split`, characters of several tokens are spread evenly over them. Returns
    None if the pieces do not make up the text.
    """
    texts: list[str | None] = [None] * len(pieces)
    position, index = 0, 0
    while index < len(pieces):
        piece, end = pieces[index], index + 1
        if UNKNOWN in piece:
            while end < len(pieces) and UNKNOWN in pieces[end]:
                end += 1
            stop = _run_end(pieces, index, end, text, position)
            if stop is None:
                return None
            part, run = text[position:stop], pieces[index:end]
            texts[index:end] = split(part, run) or _spread(part, len(run))
            position = stop
        elif stop := _piece_end(piece, text, position):
            texts[index], position = text[position:stop], stop
        index = end
    return texts if position == len(text) else None


def _piece_end(piece: str, text: str, position: int) -> int | None:
    """Return where a piece that begins at `position` ends; None if none does."""
    if not piece:
        return None
    if text.startswith(piece, position):
        return position + len(piece)
    if text[position : position + 1].isspace() and text.startswith(piece, position + 1):
        return position + 1 + len(piece)
    tail = text[position : position + len(piece)]
    # The text ends before a stop string that begins within the token.
    return len(text) if tail and piece.startswith(tail) else None


def _run_end(
    pieces: Sequence[str], first: int, end: int, text: str, position: int
) -> int | None:
    """Return where the run of pieces `first` to `end` ends: where the next one begins.

    A character has at least one U+FFFD in the pieces, which bounds the length.
    """
    size = sum(map(len, pieces[first:end]))
    known = size - sum(piece.count(UNKNOWN) for piece in pieces[first:end])
    for piece in pieces[end : end + 8]:  # special tokens may precede the next one
        limit = position + size + len(piece)
        if piece and UNKNOWN not in piece:
            start = text.find(piece, position + known + 1, limit)
            if start >= 0:
                return start
    return len(text) if position < len(text) <= position + size else None


def _spread(text: str, count: int) -> list[str]:
    ends = [len(text) * i // count for i in range(count + 1)]
    return [text[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def make_splitter(model: Path) -> Splitter:
    """Return a splitter that encodes the text with the tokenizer of a model directory.

    The tokenizer is loaded when a text is split. Without a tokenizer, or where it
    encodes the text to other tokens, the splitter returns None.
    """
    load = functools.cache(lambda: _load(model))

    @functools.cache
    def split(text: str, pieces: tuple[str, ...]) -> list[str] | None:
        tokenizer = load()
        if tokenizer is None:
            return None
        tokens = tokenizer.encode(text, add_special_tokens=False)
        if tuple(tokenizer.decode([token]) for token in tokens) != pieces:
            return None
        # A character is part of the token that completes it.
        ends = [
            len(tokenizer.decode(tokens[: i + 1]).rstrip(UNKNOWN))
            for i in range(len(tokens))
        ]
        ends[-1] = len(text)
        return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    return lambda text, pieces: split(text, tuple(pieces))


def _load(model: Path) -> Any:
    from oreal_jax.data import load_tokenizer

    try:
        return load_tokenizer(model)
    except InputError:
        return None
