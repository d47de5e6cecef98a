"""Formulas: read by math-verify, compared by it, and compared once more by us.

Text of a model is never evaluated: math-verify's reader for plain expressions, which
would, is not used, and its LaTeX reader evaluates number literals alone. math-verify
rounds numbers to compare them; what it calls equal must therefore agree to many digits
of its own size (to twelve where decimals are in it), at a few points where it has
variables.
"""

import functools
import logging
import re
from typing import Any

from oreal_jax.verify.numbers import TRIGONOMETRIC

# It warns that it has no time limit of its own; the pool has one.
logging.getLogger("math_verify").setLevel(logging.ERROR)

DEGREES = re.compile(r"(\d+)\s*\^\\circ")
DIGITS = 200
ROUNDED = "1e-12"  # of their size: how far decimals may differ
EXACT = "1e-180"  # and numbers without a decimal point
POINTS = (0.37, 1.93, -2.71)  # where formulas with variables are compared


@functools.lru_cache(maxsize=4096)
def read(text: str) -> tuple | None:
    """math-verify's reading of a LaTeX formula, or None."""
    from math_verify import LatexExtractionConfig, parse

    if TRIGONOMETRIC.search(text):  # where the reader takes degrees for radians
        text = DEGREES.sub(r"\\left(\\frac{\1\\pi}{180}\\right)", text)
        if r"^\circ" in text:
            return None
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
    first, other = imaginary(gold[0]), imaginary(mine[0])
    if is_formula(first) and is_formula(other) and "%" not in ours + golds:
        if not at_points(first, other) and (undefined(first) or undefined(other)):
            return None  # and who knows what simplifying makes of it
        if differ(first, other):
            return False  # far cheaper to see than to prove
        if constant(first) and constant(other):
            return True
    from math_verify import verify

    equal = verify(
        list(gold), list(mine), float_rounding=12, timeout_seconds=None, strict=True
    )
    if equal and differ(first, other):
        return None if getattr(first, "is_Relational", False) else False
    return equal


def is_formula(side: Any) -> bool:
    """Whether it has a value where its letters have."""
    import sympy

    return isinstance(side, sympy.Expr)


def constant(formula: Any) -> bool:
    """Whether it is an exact number, with a value that can be told."""
    import sympy

    exactly = not formula.free_symbols and not formula.has(sympy.Float)
    return exactly and bool(at_points(formula, formula))


def imaginary(side: Any) -> Any:
    """With i for what is read as a letter where it stands alone."""
    import sympy

    if not is_formula(side):
        return side
    return side.subs({s: sympy.I for s in side.free_symbols if s.name == "i"})


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
        if gold.lhs == mine.lhs:
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


def undefined(formula: Any) -> bool:
    """Whether it has no value, not even an infinite one, as 1/0."""
    import sympy

    point = dict.fromkeys(formula.free_symbols, sympy.Rational(str(POINTS[0])))
    return exact(formula.subs(point)).has(sympy.zoo, sympy.nan)


@functools.lru_cache(maxsize=4096)
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
    """A rational number as it is, another to `DIGITS`."""
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
