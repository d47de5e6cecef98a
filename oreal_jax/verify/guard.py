"""What is too expensive, or too odd, to be read as a formula.

Known bombs are refused at sight; the pool's deadline is for those that nobody thought
of.
"""

import math
import re

DEEPEST = 20  # nested brackets
EXPANDED = 50  # the highest power of a bracket with letters: it may be multiplied out
POWER = 10_000  # the highest product of exponents where a power is raised to a power

SERIES = re.compile(r"\\(?:sum|prod|int|lim)(?![a-zA-Z])")  # sums, integrals, limits
EXPONENT = re.compile(r"\^\s*[{(]?\s*[-+]?(\d+)")
BRACKET_POWER = re.compile(r"[)}\]]\s*\^\s*[{(]?\s*[-+]?(\d+)")
LETTER = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]")
DANGER = [
    (re.compile(r"\*\*|\^\s*(?:\w|\{[^{}]*\}|\d+)\s*\^"), "a tower of powers"),
    (re.compile(r"(?:\\exp\b.*){3}"), "a tower of powers"),
    (re.compile(r"\^\s*[{(]?\s*[-+]?\d{5,}|\^\s*[{(][^{}]*\d\s*\^"), "a huge power"),
    (re.compile(r"\d{5,}\s*\)*\s*!|!\s*[)}\]]*\s*!|\^[^!]{0,20}!"), "a huge factorial"),
    (re.compile(r"\d{3}.*[)}\]]\s*!"), "a huge factorial"),
    (re.compile(r"binom[^a-z]*(?:\^|\d{6})"), "a huge binomial"),
    # Not mathematics. The reader passes only numbers to sympy's evaluator (a test
    # holds it to that); this keeps code out of its sight altogether.
    (re.compile(r"__|[\"`]|\b(?:lambda|import|exec|eval|open)\b"), "code"),
]


def dangerous(text: str) -> str | None:
    """What makes a formula too expensive to read, or None."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > DEEPEST:
        return f"{deepest} nested brackets"
    powers = [int(power) for power in BRACKET_POWER.findall(text)]
    exponents = [int(power) for power in EXPONENT.findall(text) if len(power) < 5]
    if powers and (
        math.prod(exponents) > POWER or (max(powers) > EXPANDED and LETTER.search(text))
    ):
        return "a huge power"
    if tower(text) > 2:
        return "a tower of powers"
    return next((what for pattern, what in DANGER if pattern.search(text)), None)


def tower(text: str) -> int:
    """How many exponents stand on one another."""
    opened: list[bool] = []
    highest = 0
    for match in re.finditer(r"(\^\s*)?([{(])|[})]|\^", text):
        if match.group(2):
            opened.append(match.group(1) is not None)
            highest = max(highest, sum(opened))
        elif match.group() == "^":
            highest = max(highest, sum(opened) + 1)
        elif opened:
            opened.pop()
    return highest
