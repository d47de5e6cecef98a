"""Formulas: read by math-verify, compared by it, and compared once more by us.

Text of a model is never evaluated: math-verify's reader for plain expressions, which
would, is not used, and its LaTeX reader evaluates number literals alone. math-verify
rounds numbers to compare them; what it calls equal must therefore agree to twelve
digits of its own size, at a few points where it has variables.
"""

import functools
import logging
import re
from typing import Any

# It warns that it has no time limit of its own; the pool has one.
logging.getLogger("math_verify").setLevel(logging.ERROR)

DIGITS = 60
ROUNDED = "1e-12"  # of their size: how far decimals may differ
EXACT = "1e-50"  # and numbers without a decimal point
POINTS = (0.37, 1.93, -2.71)  # where formulas with variables are compared
RELATION = re.compile(r"(<|>|\\le\b|\\ge\b|\\ne\b)")
INTERVAL = re.compile(r"^([(\[])([^,]+),([^,]+)([)\]])$")
BUILDER = re.compile(
    r"^\\\{\s*(?:[a-z]\s*(?:\\in\s*\\mathbb\{R\})?)\s*(?:\||\\mid|:)(.*)\\\}$"
)
VARIABLE = re.compile(r"^[a-z](?:\([a-z]\))?$")
ELEMENT = re.compile(r"^[a-z]\s*\\in\b\s*")


@functools.lru_cache(maxsize=4096)
def read(text: str) -> tuple | None:
    """math-verify's reading of a LaTeX formula, or None."""
    from math_verify import LatexExtractionConfig, parse

    parsed = parse(
        f"${text}$",
        extraction_config=[LatexExtractionConfig()],
        parsing_timeout=None,  # pyright: ignore[reportArgumentType]
        fallback_mode="no_fallback",
    )
    return tuple(parsed) or None


def same(ours: str, golds: str) -> bool | None:
    """Whether two formulas are equal; None where one is not understood."""
    gold, mine = read(golds), read(ours)
    if not gold or not mine or drops(ours, mine) or drops(golds, gold):
        return None
    from math_verify import verify

    equal = verify(
        list(gold), list(mine), float_rounding=12, timeout_seconds=None, strict=True
    )
    if equal and differ(gold[0], mine[0]):
        return None if getattr(gold[0], "is_Relational", False) else False
    if equal:
        return True
    return same_constant(gold[0], mine[0])


def drops(text: str, found: tuple) -> bool:
    """Whether the reader took a letter behind a number for a unit and left it out."""
    match = re.search(r"\d\s*([a-zA-Z]{1,2})$", text)
    named = {str(symbol) for symbol in getattr(found[0], "free_symbols", ())}
    return match is not None and not set(match[1]) - set("ei") <= named


def differ(gold: Any, mine: Any) -> bool:
    """Whether what was called equal is not: rounded together, or solved alike."""
    import sympy

    if isinstance(gold, sympy.Expr) and isinstance(mine, sympy.Expr):
        rounded = gold.has(sympy.Float) or mine.has(sympy.Float)
        near = ROUNDED if rounded else EXACT
        return any(apart(a, b, near) for a, b in at_points(gold, mine))
    if isinstance(gold, sympy.Eq) and isinstance(mine, sympy.Eq):
        if gold.lhs == mine.lhs and isinstance(gold.lhs, sympy.Symbol):
            return differ(gold.rhs, mine.rhs)
        sides = gap(gold), gap(mine)
        ratios = [b / a for a, b in at_points(*sides) if a != 0]
        return not ratios or any(apart(ratios[0], r, ROUNDED) for r in ratios)
    if isinstance(gold, sympy.MatrixBase) and isinstance(mine, sympy.MatrixBase):
        both = gold.shape == mine.shape
        return both and any(map(differ, gold.flat(), mine.flat()))
    if isinstance(gold, sympy.Interval) and isinstance(mine, sympy.Interval):
        return differ(gold.start, mine.start) or differ(gold.end, mine.end)
    if isinstance(gold, sympy.FiniteSet) and isinstance(mine, sympy.FiniteSet):
        # Every one must have its like, whatever the order.
        return not all(
            any(not differ(a, b) for b in mine.args if comparable(a, b))
            for a in gold.args
        )
    if isinstance(gold, sympy.Tuple) and isinstance(mine, sympy.Tuple):
        return len(gold) == len(mine) and any(map(differ, gold, mine))
    return False


def gap(equation: Any) -> Any:
    """What an equation says is 0."""
    return equation.lhs - equation.rhs


def comparable(one: Any, other: Any) -> bool:
    """Whether `differ` has something to say about the two."""
    import sympy

    kinds = (sympy.Expr, sympy.Tuple, sympy.Set, sympy.Eq)
    return any(isinstance(one, k) and isinstance(other, k) for k in kinds) or (
        not isinstance(one, kinds) or not isinstance(other, kinds)
    )


def at_points(gold: Any, mine: Any) -> list[tuple[Any, Any]]:
    """Both formulas in numbers at the same points, where they have a value there."""
    import sympy

    symbols = sorted(gold.free_symbols | mine.free_symbols, key=str)
    found = []
    for point in POINTS if symbols else POINTS[:1]:
        values = {
            symbol: sympy.Rational(str(point)) + sympy.Rational(place, 7)
            for place, symbol in enumerate(symbols)
        }
        pair = [exact(side.subs(values)) for side in (gold, mine)]
        if all(side.is_number and side.is_finite for side in pair):
            found.append((pair[0], pair[1]))
    return found


def exact(constant: Any) -> Any:
    """A rational number as it is, another to sixty digits."""
    import sympy

    done = constant.doit()
    return done if done.is_Rational else sympy.N(constant, DIGITS)


def apart(one: Any, other: Any, relative: str) -> bool:
    """Whether two numbers differ by more than a part of their size."""
    import sympy

    if one.is_Rational and other.is_Rational and relative == EXACT:
        return bool(one != other)
    largest = max(abs(one), abs(other))
    return bool(abs(one - other) > largest * sympy.Float(relative))


def same_constant(gold: Any, mine: Any) -> bool:
    """Whether two exact constants are one although simplifying did not show it."""
    import sympy

    if not (isinstance(gold, sympy.Expr) and isinstance(mine, sympy.Expr)):
        return False
    # i is read as a letter where it stands alone.
    unit = lambda side: {s: sympy.I for s in side.free_symbols if s.name == "i"}
    gold, mine = gold.subs(unit(gold)), mine.subs(unit(mine))
    if gold.free_symbols or mine.free_symbols or gold.has(sympy.Float):
        return False
    if mine.has(sympy.Float):
        return False
    pairs = at_points(gold, mine)
    return bool(pairs) and not apart(*pairs[0], EXACT)


def same_set(ours: str, golds: str) -> bool | None:
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
    number = sympy.nsimplify(found[0]) if found[0].has(sympy.Float) else found[0]
    return sympy.simplify(number)
