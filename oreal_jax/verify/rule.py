"""The rule: is the answer of a completion equal to the gold answer?

Exact text and exact numbers first; what is left goes to math-verify's LaTeX reader.
Text of a model is never evaluated: math-verify's reader for plain expressions, which
would, is not used, and its LaTeX reader evaluates number literals alone. A false
"right" is worse than a false "wrong", so what cannot be read or would cost too much is
undecided.
"""

import functools
import logging
import re
from fractions import Fraction

from oreal_jax.verify import extract
from oreal_jax.verify.guard import dangerous
from oreal_jax.verify.verdict import Verdict

# It warns that it has no time limit of its own; the pool has one.
logging.getLogger("math_verify").setLevel(logging.ERROR)

LONGEST = 1000  # characters of an answer that is read at all
PRECISE = 10  # digits from which a rounded decimal stands for its fraction

REPLACED = {
    "−": "-", "–": "-", "—": "-", "×": "\\times ", "·": "\\cdot ", "÷": "/",
    "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∞": "\\infty ", "π": "\\pi ",
    "°": "^\\circ ", "∪": "\\cup ", "\u00a0": " ",
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\left": "", "\\right": "",
    ",\\! ": ",",
    "\\!": "", "\\,": " ", "\\;": " ", "\\:": " ", "\\$": "", "\\%": "%", "{,}": ",",
    "^{\\circ}": "^\\circ",
}  # fmt: skip
TEXT = re.compile(
    r"\\(?:text|textbf|mathrm|mathbf|textit|operatorname|mbox)\s*\{([^{}]*)\}"
)
ROOT = re.compile(r"√\s*(\d+|\([^()]*\)|[a-zA-Z])")
UNIT = re.compile(r"^(.*?\d[})]*)\s*([\\a-zA-Z](?:[\\a-zA-Z\s./]|\^\{?\d\}?)*)$")
BASE = re.compile(r"^\(?([0-9A-Za-z]+)\)?_\{?(\d+)\}?$")
WORDS = re.compile(r"^[A-Za-z][A-Za-z ,.'()-]*$")
INTEGER = r"\d{1,3}(?:,\d{3})+|\d+"
DECIMAL = re.compile(rf"^([-+]?)({INTEGER})?(?:\.(\d*))?$")
FRACTION = re.compile(
    r"^([-+]?)(\d*)\s*(?:\\frac\s*(?:\{(-?\d+)\}|(\d))\s*(?:\{(-?\d+)\}|(\d))|(\d+)/(\d+))$"
)


def judge(completion: str, gold: str) -> Verdict:
    """Judges a completion by rule. Never raises on any text."""
    found, why = extract.answer(completion)
    if found is None:
        return Verdict("wrong", why)
    if len(found) > LONGEST:
        return Verdict("wrong", f"an answer of {len(found)} characters")
    gold = extract.gold_answer(gold)
    if len(gold) > LONGEST:
        return Verdict("undecided", "gold answer not understood")
    ours, golds = normalised(found), normalised(gold)
    right = Verdict("right", f"equal: {shortened(found)}")
    wrong = Verdict("wrong", f"{shortened(found)} is not {shortened(gold)}")
    if not ours:
        return Verdict("wrong", f"nothing is left of the answer {shortened(found)}")
    if bare(ours) == bare(golds):
        return right
    for rule in (by_base, by_number, by_unit, by_words):
        equal = rule(ours, golds)
        if equal is not None:
            return right if equal else wrong
    for text, whose in ((ours, "answer"), (golds, "gold answer")):
        danger = dangerous(text)
        if danger:
            return Verdict("undecided", f"the {whose} holds {danger}")
    try:
        equal = by_algebra(ours, golds)
    except Exception:  # sympy raises anything on formulas without a meaning
        equal = None
    if equal is None:
        shown = f"{shortened(found)} against {shortened(gold)}"
        return Verdict("undecided", f"not understood: {shown}")
    return right if equal else wrong


def warm_up() -> None:
    """Loads what is otherwise loaded at the first formula."""
    judge("\\boxed{\\frac{x}{2}}", "\\frac{y}{2}")


def shortened(text: str) -> str:
    """Text for a message."""
    text = " ".join(text.split())
    return text if len(text) <= 40 else text[:37] + "..."


def normalised(text: str) -> str:
    """One spelling for what is only written differently."""
    text = ROOT.sub(lambda m: f"\\sqrt{{{m.group(1)}}}", text.strip())
    for old, new in REPLACED.items():
        text = text.replace(old, new)
    text = TEXT.sub(lambda m: " " + m.group(1) + " ", text).replace("$", "")
    text = re.sub(r"\s+", " ", text).strip()
    if text[:2] in ("\\(", "\\[") and text[-2:] in ("\\)", "\\]"):
        text = text[2:-2].strip()
    return text.rstrip(".").strip()


def bare(text: str) -> str:
    """Text without spaces; the case of single letters matters, of words not."""
    joined = "".join(text.split())
    return joined.lower() if WORDS.match(text) and len(joined) > 1 else joined


def by_base(ours: str, golds: str) -> bool | None:
    """numbers in a base"""
    one, other = BASE.match(ours), BASE.match(golds)
    if not one or not other:
        return None
    return one.groups() == other.groups()


def by_number(ours: str, golds: str) -> bool | None:
    """numbers"""
    theirs = number(golds)
    if theirs is None:
        return None
    mine = number(assigned(ours)) if "=" not in golds else None
    if mine is None:
        return None
    # 28 for 28%, or 28% for 28, is a way of writing; so is 0.28 for 28%.
    percent = ours.endswith("%") != golds.endswith("%")
    scaled = mine / 100 if ours.endswith("%") else mine * 100
    if percent and scaled == theirs:
        return True
    return mine == theirs or rounds(assigned(ours), mine, theirs)


def rounds(text: str, mine: Fraction, theirs: Fraction) -> bool:
    """Whether a long decimal is what a calculator prints for an endless one."""
    digits = re.match(r"^-?0*\.?0*(\d*)\.?(\d*)$", text.replace(",", ""))
    if not digits or "." not in text or len("".join(digits.groups())) < PRECISE:
        return False
    unit = Fraction(1, 10 ** len(text.split(".")[1]))
    endless = 10**400 % theirs.denominator != 0
    return endless and abs(mine - theirs) < unit


def by_unit(ours: str, golds: str) -> bool | None:
    """numbers with units"""
    one, other = split_unit(ours), split_unit(golds)
    if one is None or other is None or not (one[1] or other[1]):
        return None
    if not (one[1] and other[1]):
        if len(one[1] + other[1]) == 1:
            return None  # 3 x against 3: a variable rather than a unit
        return one[0] == other[0]
    return one == other


def by_words(ours: str, golds: str) -> bool | None:
    """words"""
    if not WORDS.match(golds) or not WORDS.match(ours):
        return None
    choices = lambda text: sorted(part.strip(" .()") for part in text.split(","))
    if all(len(part) == 1 for part in choices(golds)):
        return [c.upper() for c in choices(ours)] == choices(golds.upper())
    if len(golds) == 1 or len(ours) == 1:
        return None  # a variable, perhaps
    return choices(ours.lower()) == choices(golds.lower())


def by_algebra(ours: str, golds: str) -> bool | None:
    """formulas"""
    gold, mine = read(golds), read(ours)
    if not gold or not mine:
        return None
    from math_verify import verify

    equal = verify(
        list(gold), list(mine), float_rounding=12, timeout_seconds=None, strict=True
    )
    if equal and has_base(ours) != has_base(golds):
        return None
    return equal and not tells_apart(gold[0], mine[0])


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


def tells_apart(gold, mine) -> bool:
    """Whether two numbers that were rounded together differ after all."""
    import sympy

    if not all(isinstance(x, sympy.Expr) and x.is_number for x in (gold, mine)):
        return False
    difference = abs(sympy.N(gold - mine, 30))
    return bool(difference > abs(sympy.N(gold, 30)) * sympy.Float("1e-12"))


def has_base(text: str) -> bool:
    """Whether a number carries a subscript, such as a base."""
    return bool(re.search(r"\d\s*_", text))


def assigned(text: str) -> str:
    """The right side of `x = 5`; other text as it is."""
    match = re.match(r"^[a-zA-Z](?:_\{?\w+\}?)?\s*=\s*([^=]+)$", text)
    return match.group(1).strip() if match else text


def split_unit(text: str) -> tuple[Fraction, str] | None:
    """A number and the unit behind it (may be empty)."""
    plain = number(text)
    if plain is not None:
        return plain, ""
    match = UNIT.match(text.replace("^\\circ", " degrees"))
    value = match and number(match.group(1).strip())
    if not match or value is None:
        return None
    unit = match.group(2).replace(".", "").strip().lower()
    words = [w.removesuffix("s") if len(w) > 2 else w for w in unit.split()]
    return None if unit.startswith("\\") else (value, " ".join(words))


def number(text: str) -> Fraction | None:
    """The exact value of an integer, a decimal, a fraction or a mixed number."""
    text = text.removesuffix("%").strip()
    if len(text) > 100:
        return None
    if match := DECIMAL.match(text):
        sign, whole, decimals = match.groups()
        if whole is None and not decimals:
            return None
        value = Fraction((whole or "0").replace(",", "") + "." + (decimals or "0"))
        return -value if sign == "-" else value
    if match := FRACTION.match(text):
        sign, whole, *parts = match.groups()
        top, bottom = [int(part) for part in parts if part is not None]
        if bottom == 0 or (whole and parts[4] is not None):
            return None  # 12/3 after a whole number is no mixed number
        value = Fraction(top, bottom) + (int(whole) if whole else 0)
        return -value if sign == "-" else value
    return None
