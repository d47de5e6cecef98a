"""Comparison of sets of real numbers, however they are described.

Intervals, inequalities, set-builders and the reals without some points become one
form. `algebra` reads their bounds.
"""

import re
from typing import Any, NamedTuple

import sympy

from oreal_jax.verify.algebra import read

RELATION = re.compile(r"(<|>|\\le\b|\\ge\b|\\ne\b)")
FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
INTERVAL = re.compile(r"^([(\[])([^,]+),([^,]+)([)\]])$")
BUILDER = re.compile(
    r"^\\\{\s*(?:[a-z]\s*(?:\\in\s*\\mathbb\{R\})?)\s*(?:\||\\mid|:)(.*)\\\}$"
)
VARIABLE = re.compile(r"^[a-z](?:\([a-z]\))?$")
ELEMENT = re.compile(r"^[a-z]\s*\\in\b\s*")


class Region(NamedTuple):
    """A set of real numbers, and the variable that its description names, or ""."""

    numbers: Any
    variable: str


def same_region(answer: str, gold: str) -> bool | None:
    """Return whether inequalities and intervals mean the same numbers.

    Two plain intervals are left to other rules, for (1, 2) may be a point.
    """
    if not any(
        RELATION.search(text) or r"\mathbb{R}" in text or "setminus" in text
        for text in (answer, gold)
    ):
        return None
    first, second = region(answer), region(gold)
    if first is None or second is None:
        return None
    if first.variable and second.variable and first.variable != second.variable:
        return None
    if first.numbers == second.numbers:
        return True
    return bool(first.numbers.symmetric_difference(second.numbers).is_empty)


def region(text: str) -> Region | None:
    """Return the set of real numbers that a text describes, or None."""
    text = ELEMENT.sub("", re.sub(r"\\text\{\s*(or|and)\s*\}", r" \1 ", text).strip())
    if match := BUILDER.match(text):
        text = match[1].strip()
    variables, union = set(), sympy.S.EmptySet
    for piece in re.split(r"\\cup\b|\bor\b|\\vee\b", text):
        intersection = sympy.S.Reals
        joints = (
            r"\\cap\b|\band\b|\\wedge\b|," if RELATION.search(piece) else r"\\cap\b"
        )
        for condition in re.split(joints, piece):
            part = simple_region(condition.strip())
            if part is None:
                return None
            intersection = intersection.intersect(part.numbers)
            variables.add(part.variable)
        union = union.union(intersection)
    variables.discard("")
    return Region(union, "".join(variables)) if len(variables) < 2 else None


def simple_region(text: str) -> Region | None:
    """Read an interval, inequalities, points, or the reals without points."""
    text = text.replace(r"\infty", "oo").strip()
    if "setminus" in text:
        left, right = text.split(r"\setminus", 1)
        base, removed = simple_region(left), simple_region(right)
        return Region(base.numbers - removed.numbers, "") if base and removed else None
    if re.fullmatch(r"\\mathbb\{?R\}?", text):
        return Region(sympy.S.Reals, "")
    if text.startswith(r"\{") and text.endswith(r"\}") and not RELATION.search(text):
        points = [bound(point) for point in text[2:-2].split(",")]
        return None if None in points else Region(sympy.FiniteSet(*points), "")
    if match := INTERVAL.match(text):
        low, high = bound(match[2]), bound(match[3])
        if low is None or high is None:
            return None
        interval = sympy.Interval(low, high, match[1] == "(", match[4] == ")")
        return Region(interval, "")
    terms = [term.strip() for term in RELATION.split(text)]
    variables = {term for term in terms[::2] if VARIABLE.match(term)}
    if len(variables) != 1 or len(terms) not in (3, 5):
        return None
    intersection = sympy.S.Reals
    for start in range(0, len(terms) - 2, 2):
        numbers = solve(*terms[start : start + 3])
        if numbers is None:
            return None
        intersection = intersection.intersect(numbers)
    return Region(intersection, variables.pop())


def solve(left: str, relation: str, right: str) -> Any:
    """Return the numbers that stand in a relation to a bound, or None."""
    if not VARIABLE.match(left):
        left, relation, right = right, FLIPPED[relation], left
    limit = bound(right)
    if limit is None or not VARIABLE.match(left):
        return None
    if relation == r"\ne":
        return sympy.S.Reals - sympy.FiniteSet(limit)
    strict = relation in "<>"
    if relation in (">", r"\ge"):
        return sympy.Interval(limit, sympy.oo, strict, True)
    return sympy.Interval(-sympy.oo, limit, True, strict)


def bound(text: str) -> Any:
    """Return a real number or an infinity, or None."""
    text = text.strip()
    if re.fullmatch(r"[-+]?\s*oo", text):
        return -sympy.oo if "-" in text else sympy.oo
    formulas = read(text.replace("oo", r"\infty"))
    if not formulas or not isinstance(number := formulas[0], sympy.Expr):
        return None
    if not number.is_number:
        return None
    if number.has(sympy.Float):
        number = sympy.nsimplify(number, rational=True)
    return sympy.simplify(number)
