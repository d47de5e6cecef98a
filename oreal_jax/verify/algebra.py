"""Comparison of formulas by math-verify, checked numerically.

Text of a model is never evaluated: math-verify's reader for plain expressions, which
would evaluate it, is not used, and its LaTeX reader evaluates number literals only.
math-verify rounds numbers to compare them; formulas that it calls equal must therefore
agree to many digits (to twelve if they hold decimals), at several points if they hold
variables.

Formulas that agree only where all variables are positive, as the root of ab and the
product of the roots, are undecided; equal if all their letters stand for lengths, times
or counts by convention (`POSITIVE_LETTERS`).
"""

import functools
import logging
import re
from collections.abc import Iterable
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify

from oreal_jax.verify.numbers import TRIGONOMETRIC

# It warns that it has no time limit of its own; the pool has one.
logging.getLogger("math_verify").setLevel(logging.ERROR)

DEGREES = re.compile(r"(\d+)\s*\^\\circ")
DIGITS = 200
ROUNDED = "1e-12"  # relative tolerance for decimals
EXACT = "1e-180"  # and for numbers without a decimal point
Points = tuple[tuple[str, str], ...]  # values of variables in turn
POINTS: Points = (
    ("0.37", "0.37"), ("1.93", "1.93"), ("-2.71", "-2.71"), ("1.31", "-1.31"),
    ("-1.31", "1.31"),
)  # fmt: skip
POSITIVE: Points = (
    ("0.013", "0.013"), ("0.37", "0.37"), ("1.93", "1.93"), ("47.3", "47.3"),
)  # fmt: skip
# Lengths, heights and radii, times, counts, and the acceleration of gravity. Letters
# that may well be negative are left out: d (a difference), k and m (any integer), w.
POSITIVE_LETTERS = frozenset(["ell", *"lLhHrRtTnNg"])
PIECEWISE = (
    sympy.Abs, sympy.sign, sympy.floor, sympy.ceiling, sympy.Piecewise, sympy.Max,
    sympy.Min,
)  # fmt: skip


@functools.lru_cache(maxsize=4096)
def read(text: str) -> tuple | None:
    """Return math-verify's readings of a LaTeX formula, or None."""
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


def same(answer: str, gold: str) -> bool | None:
    """Return whether two formulas are equal; None if one is not understood."""
    golds, answers = read(gold), read(answer)
    if not golds or not answers:
        return None
    if drops_letter(answer, answers[0]) or drops_letter(gold, golds[0]):
        return None
    first, second = imaginary(golds[0]), imaginary(answers[0])
    both_values = isinstance(first, sympy.Expr) and isinstance(second, sympy.Expr)
    if both_values and "%" not in answer + gold:
        if not at_points(first, second) and (undefined(first) or undefined(second)):
            return None  # simplifying could make anything of it
        if (agreed := agree(first, second)) is not True:
            return agreed  # far cheaper to see than to prove
        if equal_constants(first, second) or differ(first, second):
            return True
    equations = [side for side in (first, second) if isinstance(side, sympy.Eq)]
    if len(equations) == 1 and not is_name(equations[0].lhs):
        return None  # the reader takes x^2 + y^2 = 25 for a name of 25
    equal = verify(
        list(golds), list(answers), float_rounding=12, timeout_seconds=None, strict=True
    )
    if both_values and not equal and at_points(first, second):
        return None  # equal as numbers, but not proved
    if both_values and equal and not at_points(first, second) and first != second:
        return None  # it takes infinite values for any other
    agreed = agree(first, second)
    if equal and agreed is False and getattr(first, "is_Relational", False):
        return None
    return equal and agreed if agreed is not None else None


def is_name(side: Any) -> bool:
    """Return whether a side of an equation is a variable, f(x) or a tuple of them."""
    return not isinstance(side, sympy.Expr) or side.is_Symbol or side.is_Function


def equal_constants(first: sympy.Expr, second: sympy.Expr) -> bool:
    """Return whether constants are equal, with decimals as exact fractions."""
    first, second = rational(first), rational(second)
    if first.free_symbols or second.free_symbols:
        return False
    return bool(at_points(first, second)) and not differ(first, second)


def rational(formula: sympy.Expr) -> Any:
    """Return a formula with fractions for decimals."""
    return formula.xreplace(
        {
            decimal: sympy.Rational(str(decimal))
            for decimal in formula.atoms(sympy.Float)
        }
    )


def imaginary(side: Any) -> Any:
    """Replace a variable i, as a lone i is read, by the imaginary unit."""
    if not isinstance(side, sympy.Expr):
        return side
    return side.subs({s: sympy.I for s in side.free_symbols if str(s) == "i"})


def drops_letter(text: str, formula: Any) -> bool:
    """Return whether the reader dropped a letter after a number, as a unit."""
    match = re.search(r"\d\s*([a-zA-Z]{1,2})$", text)
    names = {str(symbol) for symbol in getattr(formula, "free_symbols", ())}
    return match is not None and not set(match[1]) - set("ei") <= names


def agree(gold: Any, answer: Any) -> bool | None:
    """Return whether the values of two sides agree; None if only some of them do.

    Sides of different or other kinds agree, for there is nothing to compare.
    """
    are = lambda kind: isinstance(gold, kind) and isinstance(answer, kind)
    if are(sympy.Expr):
        if not differ(gold, answer):
            return True
        if not at_points(gold, answer, POSITIVE) or differ(gold, answer, POSITIVE):
            return False
        return True if has_positive_letters(gold, answer) else None
    if are(sympy.Eq):
        if gold.lhs == answer.lhs:
            return agree(gold.rhs, answer.rhs)
        pairs = at_points(gold.lhs - gold.rhs, answer.lhs - answer.rhs)
        ratios = [b / a for a, b in pairs if a != 0]
        return bool(ratios) and not any(apart(ratios[0], r, ROUNDED) for r in ratios)
    if are(sympy.MatrixBase):
        return gold.shape != answer.shape or every(
            map(agree, gold.flat(), answer.flat())
        )
    if are(sympy.Interval):
        return every([agree(gold.start, answer.start), agree(gold.end, answer.end)])
    if are(sympy.FiniteSet):  # in any order
        return every(
            some(agree(a, b) for b in answer.args if comparable(a, b))
            for a in gold.args
        )
    if are(sympy.Tuple):
        return len(gold) != len(answer) or every(map(agree, gold, answer))
    return True


def every(values: Iterable[bool | None]) -> bool | None:
    """Return False if one is False, else None if one is None, else True."""
    values = list(values)
    return False if False in values else None if None in values else True


def some(values: Iterable[bool | None]) -> bool | None:
    """Return True if one is True, else None if one is None, else False."""
    values = list(values)
    return True if True in values else None if None in values else False


def differ(gold: sympy.Expr, answer: sympy.Expr, points: Points = POINTS) -> bool:
    """Return whether the values of two formulas differ at one of the points."""
    decimals = gold.has(sympy.Float) or answer.has(sympy.Float)
    tolerance = ROUNDED if decimals else EXACT
    return any(apart(a, b, tolerance) for a, b in at_points(gold, answer, points))


def has_positive_letters(gold: sympy.Expr, answer: sympy.Expr) -> bool:
    """Return whether all letters are positive by convention.

    Not so if a formula is another one beyond some value, as |n - 10| is.
    """
    if gold.has(*PIECEWISE) or answer.has(*PIECEWISE):
        return False
    names = map(str, gold.free_symbols | answer.free_symbols)
    return all(name.split("_")[0] in POSITIVE_LETTERS for name in names)


def comparable(first: Any, second: Any) -> bool:
    """Return whether `agree` can tell the two apart."""
    kinds = (sympy.Expr, sympy.Tuple, sympy.Set, sympy.Eq)
    return any(isinstance(first, k) and isinstance(second, k) for k in kinds) or (
        not isinstance(first, kinds) or not isinstance(second, kinds)
    )


def undefined(formula: Any) -> bool:
    """Return whether it has no value, not even an infinite one, as 1/0 or log(x oo)."""
    if formula.free_symbols and formula.has(sympy.oo, -sympy.oo):
        return True
    point = dict.fromkeys(formula.free_symbols, sympy.Rational(POINTS[0][0]))
    return evaluate(formula.subs(point)).has(sympy.zoo, sympy.nan)


@functools.lru_cache(maxsize=4096)
def at_points(gold: Any, answer: Any, points: Points = POINTS) -> list[tuple[Any, Any]]:
    """Return the values of both formulas at the same points, where both are finite."""
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    pairs = []
    for point in points if symbols else points[:1]:
        values = {
            symbol: sympy.Rational(point[place % 2]) + sympy.Rational(place, 7)
            for place, symbol in enumerate(symbols)
        }
        pair = evaluate(gold.subs(values)), evaluate(answer.subs(values))
        if all(side.is_number and side.is_finite for side in pair):
            pairs.append(pair)
    return pairs


def evaluate(constant: Any) -> Any:
    """Return a rational number as it is, any other number to `DIGITS` digits."""
    value = constant.doit()
    return value if value.is_Rational else sympy.N(constant, DIGITS)


def apart(first: Any, second: Any, tolerance: str) -> bool:
    """Return whether numbers differ by more than a relative tolerance."""
    if first.is_Rational and second.is_Rational and tolerance == EXACT:
        return bool(first != second)
    size = max(abs(first), abs(second))
    return bool(abs(first - second) > size * sympy.Float(tolerance))
