"""The text of a completion whose tokens arrive piece by piece."""

import copy
from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"  # ends a text whose last character has bytes in later tokens


class TextStream:
    """Decodes a completion in pieces, up to the first stop string.

    Text is held back while it may become part of a character or of a stop string.
    `stopped` is whether a stop string was reached.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]):
        """Decode by `decode`, which may treat the first token of a text specially."""
        self.stopped = False
        self._decode, self._stops = decode, stops
        self._context: list[int] = []  # decoded before `_pending`, for its spaces
        self._pending: list[int] = []  # since the last complete character
        self._held = ""

    def add(self, tokens: Sequence[int], *, last: bool = False) -> tuple[str, int]:
        """Return new text, and how many of the tokens are part of the completion.

        After a stop string, that is fewer than all. `last` releases the text held back.
        """
        before = copy.copy(self)
        text = self._add(tokens, last)
        if not self.stopped:
            return text, len(tokens)
        for count in range(1, len(tokens)):
            shorter = copy.copy(before)
            shorter_text = shorter._add(tokens[:count], last=False)
            if shorter.stopped:
                return shorter_text, count
        return text, len(tokens)

    def _add(self, tokens: Sequence[int], last: bool) -> str:
        pending = [*self._pending, *tokens]
        start = len(self._decode(self._context))
        end, text = len(pending), self._decode([*self._context, *pending])[start:]
        while not last and end and text.endswith(INCOMPLETE):
            end -= 1
            text = self._decode([*self._context, *pending[:end]])[start:]
        if text:
            self._context, self._pending = pending[:end], pending[end:]
        else:
            self._pending = pending
        return self._cut(self._held + text, last)

    def _cut(self, text: str, last: bool) -> str:
        """Return text up to a stop string, without an end that may begin one."""
        ends = [end for stop in self._stops if (end := text.find(stop)) >= 0]
        self.stopped = bool(ends)
        if ends or last:
            return text[: min(ends, default=len(text))]
        end = len(text) - max((_overlap(text, s) for s in self._stops), default=0)
        self._held = text[end:]
        return text[:end]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
