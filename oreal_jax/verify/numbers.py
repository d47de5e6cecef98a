"""Exact values of numbers as people write them, and the units after them."""

import re
from fractions import Fraction
from typing import NamedTuple

MAX_LENGTH = 100  # characters of a number
MIN_DIGITS = 10  # from which a rounded decimal stands for its fraction
MAX_EXPONENT = 300

GROUPED = re.compile(r"^\d{1,3}(?:([, ])\d{3})(?:\1\d{3})*$")
DECIMAL = re.compile(r"^(\d[\d, ]*)?(?:\.(\d*))?$")
REPEATING = re.compile(
    r"^(\d*)\.(\d*)(?:\\overline\s*\{(\d+)\}|\\overline (\d)|\\bar\s*\{(\d+)\}"
    r"|\\dot\s*\{(\d)\}|\((\d+)\))(?:\s*\\ldots)?$"
)
DOTTED = re.compile(r"\\dot\s*\{(\d)\}(\d*)\\dot\s*\{(\d)\}")
FRACTION = re.compile(r"^(?:(\d+)\s*)?\\frac\{\s*(-?[\d.]+)\s*\}\{\s*(-?[\d.]+)\s*\}$")
SLASH = re.compile(r"^(?:(\d+) )?(\d[\d.]*)\s*/\s*(\d[\d.]*)$")
POWER = re.compile(
    r"^(?:(\d[\d.]*)\s*(?:\\times|\\cdot|\*)\s*)?10\s*\^\s*(?:\{\s*(-?\d+)\s*\}|(\d))$"
)
EXPONENT = re.compile(r"^(\d[\d.]*)[eE]([-+]?\d+)$")


class Unit(NamedTuple):
    """A unit: its size, what it measures, and its short name."""

    factor: Fraction
    kind: str
    name: str


UNITS = {
    word: Unit(Fraction(factor), kind, words.split()[0])
    for factor, kind, words in (
        ("1/1000", "length", "mm millimeter millimetre"),
        ("1/100", "length", "cm centimeter centimetre"),
        ("1", "length", "m meter metre"),
        ("1000", "length", "km kilometer kilometre"),
        ("127/5000", "length", "in inch inches"),
        ("381/1250", "length", "ft foot feet"),
        ("1143/1250", "length", "yd yard"),
        ("201168/125", "length", "mi mile"),
        ("1/1000", "mass", "mg milligram"),
        ("1", "mass", "g gram"),
        ("1000", "mass", "kg kilogram"),
        ("1", "time", "s sec second"),
        ("60", "time", "min minute"),
        ("3600", "time", "h hr hour"),
        ("86400", "time", "d day"),
        ("604800", "time", "wk week"),
        ("1/1000", "volume", "ml milliliter millilitre"),
        ("1", "volume", "l liter litre"),
        ("1/100", "money", "cent cents"),
        ("1", "money", "dollar usd"),
        ("1", "euro", "euro €"),
        ("1", "pound", "lb pound £"),
        ("1", "yen", "yen ¥"),
        ("1", "rupee", "rupee ₹"),
        ("1", "degree", "degree deg"),
        ("1", "unit", "unit"),
    )
    for word in words.split()
}
# Words that make a number something other than a count of things.
QUALIFIERS = frozenset(
    re.findall(
        r"\S+",
        """a an and or not no is are was be to than more less least most at about around
        approximately nearly almost over under above below between if when where for
        with wrong right incorrect correct true false any all none never other of plus
        minus times mod base percent vs versus up down only but either neither nor
        cannot undefined k ten dozen hundred thousand million billion trillion
        half halve third fourth quarter fifth sixth seventh eighth ninth tenth eleventh
        twelfth sixteenth twentieth hundredth thousandth millionth factorial pi e i x y
        z root sqrt log ln exp sin cos tan choose power negative positive bn mn lakh
        crore gros score pair couple through thru modulo maybe perhaps possibly probably
        roughly fewer greater larger smaller double triple twice""",
    )
)
TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)\b")
IN_TEXT = re.compile(r"^\\text\{\s*([-+]?\d[\d.,/]*)\s+([^{}]*)\}$")
TEXT_UNIT = re.compile(r"^(.+?)\s*\\text\{([^{}]*)\}\s*(?:\^\{?(\d)\}?)?$", re.DOTALL)
BARE_UNIT = re.compile(
    r"^(.*?(?:[\d)}]|\\pi))\s*([a-zA-Z€£][a-zA-Z€£\s./]*)(?:\^\{?(\d)\}?)?$", re.DOTALL
)
POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}


def number(text: str) -> Fraction | None:
    """Return the exact value of a number alone, None for other text."""
    text = text.strip().removesuffix("%").strip()
    sign = 1
    while text[:1] in ("-", "+"):
        sign, text = (-sign if text[0] == "-" else sign), text[1:].strip()
    if not text or len(text) > MAX_LENGTH or not text.isascii():
        return None
    for read in (decimal, repeating, ratio, power_of_ten):
        value = read(text)
        if value is not None:
            return sign * value
    return None


def decimal(text: str) -> Fraction | None:
    """Read 12, 1,200.5, 1 200 or .5."""
    match = DECIMAL.match(text)
    if not match or not (match[1] or match[2]):
        return None
    integer = (match[1] or "0").strip()
    if not integer.isdigit():
        if not GROUPED.match(integer):
            return None
        integer = re.sub("[, ]", "", integer)
    return Fraction(f"{integer}.{match[2] or '0'}")


def repeating(text: str) -> Fraction | None:
    r"""Read 0.1\overline{6}, or dots over the first and last repeating digit."""
    match = REPEATING.match(DOTTED.sub(r"(\1\2\3)", text))
    if not match:
        return None
    integer, start = match[1] or "0", match[2]
    period = next(digits for digits in match.groups()[2:] if digits)
    shift = 10 ** len(start)
    tail = Fraction(int(period), 10 ** len(period) - 1) / shift
    return int(integer) + Fraction(int(start or "0"), shift) + tail


def ratio(text: str) -> Fraction | None:
    r"""Read \frac{3}{4}, 3/4, 1\frac{3}{4} or 1 3/4."""
    match = FRACTION.match(text) or SLASH.match(text)
    if not match:
        return None
    try:
        top, bottom = Fraction(match[2]), Fraction(match[3])
    except ValueError:  # two decimal points
        return None
    if not bottom or (match[1] and (top < 0 or bottom < 0)):
        return None
    return int(match[1] or 0) + top / bottom


def power_of_ten(text: str) -> Fraction | None:
    r"""Read 2.5 \times 10^{3} or 2.5e3."""
    if match := POWER.match(text):
        factor, exponent = match[1] or "1", int(match[2] or match[3])
    elif match := EXPONENT.match(text):
        factor, exponent = match[1], int(match[2])
    else:
        return None
    if abs(exponent) > MAX_EXPONENT or factor.count(".") > 1:
        return None
    return Fraction(factor) * Fraction(10) ** exponent


def same_number(answer: str, gold: str) -> bool | None:
    """Return whether two numbers are equal; None if either is not a number."""
    expected = number(gold)
    if re.match(r"^-?0,\d+$", gold) and "." in answer:
        expected = number(gold.replace(",", "."))  # a decimal comma
    value = number(answer)
    if value is None or expected is None:
        return None
    # 28 for 28%, or 28% for 28, is a way of writing; so is 0.28 for 28%.
    scaled = value / 100 if answer.endswith("%") else value * 100
    if answer.endswith("%") != gold.endswith("%") and scaled == expected:
        return True
    return value == expected or rounds(answer, value, expected)


def rounds(text: str, value: Fraction, expected: Fraction) -> bool:
    """Return whether a long decimal is what a calculator prints for an endless one."""
    match = re.match(r"^[-+]?([\d,]*)\.(\d+)$", text)
    if not match:
        return False
    if len((match[1] + match[2]).replace(",", "").lstrip("0")) < MIN_DIGITS:
        return False
    endless = 10**400 % expected.denominator != 0
    return endless and abs(value - expected) < Fraction(1, 10 ** len(match[2]))


def split_unit(text: str) -> tuple[str, str]:
    """Return a formula and the unit after it, in words; "" if there is none."""
    if text.endswith(r"^\circ") and not TRIGONOMETRIC.search(text):
        return text.removesuffix(r"^\circ").strip(), "degree"
    if match := TEXT_UNIT.match(IN_TEXT.sub(r"\1\\text{\2}", text)):
        value, unit, power = match.groups()
        inner_value, inner_unit = split_unit(value)
        if inner_unit and "/" in value[-3:]:
            value, unit = inner_value, f"{inner_unit} / {unit}"
        only_known = False
    elif match := BARE_UNIT.match(text):
        value, unit, power = match.groups()
        only_known = True  # for it may be a product of variables
    else:
        return text, ""
    value = value.rstrip("\\ ")  # of a space before the unit
    words = re.sub(r"[^\w€£]", " ", unit.lower().replace("/", " per ")).split()
    powers = [POWERS[word] for word in words if word in POWERS]
    words = [short_name(word) for word in words if word not in POWERS]
    known = all(word in UNITS and len(word) > 1 for word in words if word != "per")
    if (
        not 0 < len(words) <= 4
        or QUALIFIERS & set(words)
        or any(word.isdigit() for word in words)
        or not re.search(r"\d|\\pi|^[a-z]$", value)
        or (only_known and not known)
        or value.count("(") != value.count(")")
        or value.count("{") != value.count("}")
    ):
        return text, ""
    exponent = int(power) if power else powers[0] if powers else 1
    return value, " ".join(words) + (f" ^{exponent}" if exponent > 1 else "")


def short_name(word: str) -> str:
    """Return the short name of a unit; another word without its s."""
    singular = word.removesuffix("s") if len(word) > 2 and word not in UNITS else word
    return UNITS[singular].name if singular in UNITS else singular


def conversion(unit: str, gold_unit: str) -> Fraction | None:
    """Return how many gold units a unit is; 0 if their kinds differ."""
    name, _, power = unit.partition(" ^")
    gold_name, _, gold_power = gold_unit.partition(" ^")
    if name not in UNITS or gold_name not in UNITS:
        return None
    first, second = UNITS[name], UNITS[gold_name]
    if (first.kind, power) != (second.kind, gold_power):
        return Fraction(0)
    return (first.factor / second.factor) ** int(power or 1)
