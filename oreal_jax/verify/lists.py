"""Lists, sets and tuples: their brackets and the texts between their commas."""

import itertools
import re
from typing import NamedTuple

from oreal_jax.verify.guard import depths
from oreal_jax.verify.numbers import number

JOINTS = re.compile(
    r"\\text\{\s*,?\s*(?:and|or)\s*\}|\b(?:and|or)\b|(?<=[\d)}])(?:and|or)(?=[A-Za-z(\\])"
)


class Parts(NamedTuple):
    """A list: its brackets ("" if it has none) and the texts between its commas."""

    brackets: str
    texts: list[str]

    @property
    def ordered(self) -> bool:
        """Return whether it is a tuple or an interval."""
        return self.brackets not in ("", r"\{\}")


def parts(text: str) -> Parts | None:
    r"""Split a list at its commas; None for text that is no list.

    Outside of tuples 1 \pm 2 is a list of two.
    """
    brackets = ""
    for opening, closing in [(r"\{", r"\}"), *("()", "(]", "[)", "[]")]:
        inner = text[len(opening) : -len(closing)]
        enclosed = text.startswith(opening) and text.endswith(closing)
        if enclosed and is_balanced(inner):
            text, brackets = inner, opening + closing
            break
    text = JOINTS.sub(",", text)
    levels = depths(text)
    separators = [i for i, c in enumerate(text) if c in ",;" and levels[i] == 0]
    bounds = itertools.pairwise([-1, *separators, len(text)])
    texts = [part for start, end in bounds if (part := text[start + 1 : end].strip())]
    if brackets in ("", r"\{\}"):
        texts = [value for part in texts for value in both_signs(part)]
    if len(texts) < 2 or number(text) is not None:
        return None
    return Parts(brackets, texts)


def both_signs(text: str) -> list[str]:
    r"""Return the two values of a text with one \pm; any other text alone."""
    if len(re.findall(r"\\[pm][pm](?![a-zA-Z])", text)) != 1 or r"\pm" not in text:
        return [text]
    return [text.replace(r"\pm", sign) for sign in "+-"]


def is_balanced(text: str) -> bool:
    """Return whether every bracket is closed, and none before it is opened."""
    levels = depths(text)
    return min(levels) == levels[-1] == 0
