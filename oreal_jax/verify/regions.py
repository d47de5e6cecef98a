"""Sets of real numbers, however they are described.

Intervals, inequalities, set-builders and the reals without some points are read into
one form. The ends are formulas, read by `algebra`.
"""

import re
from typing import Any

from oreal_jax.verify.algebra import read

RELATION = re.compile(r"(<|>|\\le\b|\\ge\b|\\ne\b)")
INTERVAL = re.compile(r"^([(\[])([^,]+),([^,]+)([)\]])$")
BUILDER = re.compile(
    r"^\\\{\s*(?:[a-z]\s*(?:\\in\s*\\mathbb\{R\})?)\s*(?:\||\\mid|:)(.*)\\\}$"
)
VARIABLE = re.compile(r"^[a-z](?:\([a-z]\))?$")
ELEMENT = re.compile(r"^[a-z]\s*\\in\b\s*")


def same_region(ours: str, golds: str) -> bool | None:
    """Whether inequalities and intervals mean the same numbers; None where unknown.

    Two plain intervals are for others to compare, for (1, 2) may be a point.
    """
    both = (ours, golds)
    if not any(
        RELATION.search(t) or r"\mathbb{R}" in t or "setminus" in t for t in both
    ):
        return None
    one, other = region(ours), region(golds)
    if one is None or other is None:
        return None
    if one[1] and other[1] and one[1] != other[1]:
        return None  # of two different variables
    if one[0] == other[0]:
        return True
    return bool(one[0].symmetric_difference(other[0]).is_empty)


def region(text: str) -> tuple[Any, str] | None:
    """The set of real numbers that a text describes, and the variable it names."""
    import sympy

    text = ELEMENT.sub("", re.sub(r"\\text\{\s*(or|and)\s*\}", r" \1 ", text).strip())
    if match := BUILDER.match(text):
        text = match[1].strip()
    variables, union = set(), sympy.S.EmptySet
    for piece in re.split(r"\\cup\b|\bor\b|\\vee\b", text):
        common = sympy.S.Reals
        for condition in conditions(piece):
            found = simple_region(condition.strip())
            if found is None:
                return None
            common = common.intersect(found[0])
            variables.add(found[1])
        union = union.union(common)
    variables.discard("")
    return (union, "".join(variables)) if len(variables) < 2 else None


def conditions(piece: str) -> list[str]:
    """What must hold together."""
    if RELATION.search(piece):
        return re.split(r"\\cap\b|\band\b|\\wedge\b|,", piece)
    return re.split(r"\\cap\b", piece)


def simple_region(text: str) -> tuple[Any, str] | None:
    """An interval, inequalities, points, or the reals without some points."""
    import sympy

    text = text.replace(r"\infty", "oo").strip()
    if "setminus" in text:
        whole, out = text.split(r"\setminus", 1)
        left, right = simple_region(whole.strip()), simple_region(out.strip())
        return (left[0] - right[0], "") if left and right else None
    if re.fullmatch(r"\\mathbb\{?R\}?", text):
        return sympy.S.Reals, ""
    if text.startswith(r"\{") and text.endswith(r"\}") and not RELATION.search(text):
        points = [constant(point) for point in text[2:-2].split(",")]
        return None if None in points else (sympy.FiniteSet(*points), "")
    if match := INTERVAL.match(text):
        low, high = constant(match[2]), constant(match[3])
        if low is None or high is None:
            return None
        return sympy.Interval(low, high, match[1] == "(", match[4] == ")"), ""
    terms = [term.strip() for term in RELATION.split(text)]
    names = {term for term in terms[::2] if VARIABLE.match(term)}
    if len(names) != 1 or len(terms) not in (3, 5):
        return None
    common = sympy.S.Reals
    for start in range(0, len(terms) - 2, 2):
        found = half(*terms[start : start + 3])
        if found is None:
            return None
        common = common.intersect(found)
    return common, names.pop()


def half(left: str, relation: str, right: str) -> Any:
    """The numbers on one side of another."""
    import sympy

    turned = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
    if not VARIABLE.match(left):
        left, relation, right = right, turned[relation], left
    bound = constant(right)
    if bound is None or not VARIABLE.match(left):
        return None
    if relation == r"\ne":
        return sympy.S.Reals - sympy.FiniteSet(bound)
    strict = relation in "<>"
    if relation in (">", r"\ge"):
        return sympy.Interval(bound, sympy.oo, strict, True)
    return sympy.Interval(-sympy.oo, bound, True, strict)


def constant(text: str) -> Any:
    """A real number or an infinity, or None."""
    import sympy

    text = text.strip()
    if re.fullmatch(r"[-+]?\s*oo", text):
        return -sympy.oo if "-" in text else sympy.oo
    found = read(text.replace("oo", r"\infty"))
    if not found or not isinstance(found[0], sympy.Expr) or not found[0].is_number:
        return None
    number = (
        sympy.nsimplify(found[0], rational=True)
        if found[0].has(sympy.Float)
        else found[0]
    )
    return sympy.simplify(number)
