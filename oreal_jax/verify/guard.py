"""Formulas that are refused unread: too expensive, or not mathematics.

The pool's deadline is for those that no pattern here knows.
"""

import itertools
import math
import re

MAX_DEPTH = 20  # nested brackets
MAX_POWER_OF_SUM = 50  # of a bracket with letters, which may be multiplied out
MAX_EXPONENT = 10_000  # product of exponents where a power is raised to a power

SERIES = re.compile(r"\\(?:sum|prod|int|lim)(?![a-zA-Z])")  # sums, integrals, limits
EXPONENT = re.compile(r"\^\s*[{(]?\s*[-+]?(\d+)")
BRACKET_POWER = re.compile(r"[)}\]]\s*\^\s*[{(]?\s*[-+]?(\d+)")
LETTER = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]")
BRACKET = re.compile(r"(\^\s*)?([{(])|[})]|\^")
DANGERS = [
    (re.compile(r"\*\*|\^\s*(?:\w|\{[^{}]*\}|\d+)\s*\^"), "a tower of powers"),
    (re.compile(r"(?:\\exp\b.*){3}"), "a tower of powers"),
    (re.compile(r"\^\s*[{(]?\s*[-+]?\d{5,}|\^\s*[{(][^{}]*\d\s*\^"), "a huge power"),
    # A long number to the power of letters: sympy would factor it.
    (re.compile(r"\d{15,}[\s)}\]]*\^\s*[{(]?\s*[-+]?\d*\s*[a-zA-Z\\]"), "a huge power"),
    (re.compile(r"\d{5,}\s*\)*\s*!|!\s*[)}\]]*\s*!|\^[^!]{0,20}!"), "a huge factorial"),
    (re.compile(r"\d{3}.*[)}\]]\s*!"), "a huge factorial"),
    (re.compile(r"binom[^a-z]*(?:\^|\d{6})"), "a huge binomial"),
    # Not mathematics. The reader passes only numbers to sympy's evaluator, as a test
    # checks; this keeps code away from it altogether.
    (re.compile(r"__|[\"`]|\b(?:lambda|import|exec|eval|open)\b"), "code"),
]


def dangerous(text: str) -> str | None:
    """Return the reason that a formula is not read, or None."""
    if (depth := max(depths(text))) > MAX_DEPTH:
        return f"{depth} nested brackets"
    powers = [int(power) for power in BRACKET_POWER.findall(text)]
    exponents = [int(power) for power in EXPONENT.findall(text) if len(power) < 5]
    if powers and (
        math.prod(exponents) > MAX_EXPONENT
        or (max(powers) > MAX_POWER_OF_SUM and LETTER.search(text))
    ):
        return "a huge power"
    if tower_height(text) > 2:
        return "a tower of powers"
    return next((what for pattern, what in DANGERS if pattern.search(text)), None)


def depths(text: str) -> list[int]:
    """Return the number of open brackets before each character and at the end."""
    steps = ((character in "([{") - (character in ")]}") for character in text)
    return list(itertools.accumulate(steps, initial=0))


def tower_height(text: str) -> int:
    """Return the number of exponents on top of one another."""
    open_brackets: list[bool] = []  # whether each is an exponent's
    height = 0
    for match in BRACKET.finditer(text):
        if match[2]:
            open_brackets.append(match[1] is not None)
            height = max(height, sum(open_brackets))
        elif match[0] == "^":
            height = max(height, sum(open_brackets) + 1)
        elif open_brackets:
            open_brackets.pop()
    return height
