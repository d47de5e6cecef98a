"""Comparison of formulas by math-verify, checked numerically.

Text of a model is never evaluated: math-verify's reader for plain expressions, which
would evaluate it, is not used, and its LaTeX reader evaluates number literals only.
math-verify rounds numbers to compare them; formulas that it calls equal must therefore
agree to many digits (to twelve if they hold decimals), at several points if they hold
variables.
"""

import functools
import logging
import re
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
POINTS = (0.37, 1.93, -2.71)  # values of variables


@functools.lru_cache(maxsize=4096)
def read(text: str) -> tuple | None:
    """math-verify's readings of a LaTeX formula, or None."""
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
    """Whether two formulas are equal; None if one is not understood."""
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
        if differ(first, second):
            return False  # far cheaper to see than to prove
        if is_exact(first) and is_exact(second):
            return True
    equal = verify(
        list(golds), list(answers), float_rounding=12, timeout_seconds=None, strict=True
    )
    if equal and differ(first, second):
        return None if getattr(first, "is_Relational", False) else False
    return equal


def is_exact(formula: sympy.Expr) -> bool:
    """Whether it is a constant without decimals that has a value."""
    constant = not formula.free_symbols and not formula.has(sympy.Float)
    return constant and bool(at_points(formula, formula))


def imaginary(side: Any) -> Any:
    """Replace a variable i, as a lone i is read, by the imaginary unit."""
    if not isinstance(side, sympy.Expr):
        return side
    return side.subs({s: sympy.I for s in side.free_symbols if str(s) == "i"})


def drops_letter(text: str, formula: Any) -> bool:
    """Whether the reader took a letter after a number for a unit and dropped it."""
    match = re.search(r"\d\s*([a-zA-Z]{1,2})$", text)
    names = {str(symbol) for symbol in getattr(formula, "free_symbols", ())}
    return match is not None and not set(match[1]) - set("ei") <= names


def differ(gold: Any, answer: Any) -> bool:
    """Whether two sides that math-verify calls equal differ: it rounds and solves."""
    are = lambda kind: isinstance(gold, kind) and isinstance(answer, kind)
    if are(sympy.Expr):
        decimals = gold.has(sympy.Float) or answer.has(sympy.Float)
        tolerance = ROUNDED if decimals else EXACT
        return any(apart(a, b, tolerance) for a, b in at_points(gold, answer))
    if are(sympy.Eq):
        if gold.lhs == answer.lhs:
            return differ(gold.rhs, answer.rhs)
        pairs = at_points(gold.lhs - gold.rhs, answer.lhs - answer.rhs)
        ratios = [b / a for a, b in pairs if a != 0]
        return not ratios or any(apart(ratios[0], r, ROUNDED) for r in ratios)
    if are(sympy.MatrixBase):
        return gold.shape == answer.shape and any(
            map(differ, gold.flat(), answer.flat())
        )
    if are(sympy.Interval):
        return differ(gold.start, answer.start) or differ(gold.end, answer.end)
    if are(sympy.FiniteSet):  # in any order
        return not all(
            any(not differ(a, b) for b in answer.args if comparable(a, b))
            for a in gold.args
        )
    if are(sympy.Tuple):
        return len(gold) == len(answer) and any(map(differ, gold, answer))
    return False


def comparable(first: Any, second: Any) -> bool:
    """Whether `differ` can tell the two apart."""
    kinds = (sympy.Expr, sympy.Tuple, sympy.Set, sympy.Eq)
    return any(isinstance(first, k) and isinstance(second, k) for k in kinds) or (
        not isinstance(first, kinds) or not isinstance(second, kinds)
    )


def undefined(formula: Any) -> bool:
    """Whether it has no value, not even an infinite one, as 1/0."""
    point = dict.fromkeys(formula.free_symbols, sympy.Rational(str(POINTS[0])))
    return evaluate(formula.subs(point)).has(sympy.zoo, sympy.nan)


@functools.lru_cache(maxsize=4096)
def at_points(gold: Any, answer: Any) -> list[tuple[Any, Any]]:
    """The values of both formulas at the same points, where both are finite."""
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    pairs = []
    for point in POINTS if symbols else POINTS[:1]:
        values = {
            symbol: sympy.Rational(str(point)) + sympy.Rational(place, 7)
            for place, symbol in enumerate(symbols)
        }
        pair = evaluate(gold.subs(values)), evaluate(answer.subs(values))
        if all(side.is_number and side.is_finite for side in pair):
            pairs.append(pair)
    return pairs


def evaluate(constant: Any) -> Any:
    """A rational number as it is, any other number to `DIGITS` digits."""
    value = constant.doit()
    return value if value.is_Rational else sympy.N(constant, DIGITS)


def apart(first: Any, second: Any, tolerance: str) -> bool:
    """Whether two numbers differ by more than a tolerance relative to their size."""
    if first.is_Rational and second.is_Rational and tolerance == EXACT:
        return bool(first != second)
    size = max(abs(first), abs(second))
    return bool(abs(first - second) > size * sympy.Float(tolerance))
