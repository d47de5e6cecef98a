"""Exact values of numbers as people write them, and the units behind them."""

import re
from fractions import Fraction

LONGEST = 100  # characters of a number
PRECISE = 10  # digits from which a rounded decimal stands for its fraction
LARGEST_EXPONENT = 300

GROUPED = re.compile(r"^\d{1,3}(?:([, ])\d{3})(?:\1\d{3})*$")
DECIMAL = re.compile(r"^(\d[\d, ]*)?(?:\.(\d*))?$")
REPEATING = re.compile(
    r"^(\d*)\.(\d*)(?:\\overline\s*\{(\d+)\}|\\overline (\d)|\\bar\s*\{(\d+)\}"
    r"|\\dot\s*\{(\d)\}|\((\d+)\))(?:\s*\\ldots)?$"
)
DOTTED = re.compile(r"\\dot\s*\{(\d)\}(\d*)\\dot\s*\{(\d)\}")
OVER = re.compile(r"^(?:(\d+)\s*)?\\frac\{\s*(-?[\d.]+)\s*\}\{\s*(-?[\d.]+)\s*\}$")
SLASH = re.compile(r"^(?:(\d+) )?(\d[\d.]*)\s*/\s*(\d[\d.]*)$")
POWER = re.compile(
    r"^(?:(\d[\d.]*)\s*(?:\\times|\\cdot|\*)\s*)?10\s*\^\s*(?:\{\s*(-?\d+)\s*\}|(\d))$"
)
EXPONENT = re.compile(r"^(\d[\d.]*)[eE]([-+]?\d+)$")

LENGTH, MASS, TIME, VOLUME, MONEY = "length", "mass", "time", "volume", "money"
KINDS: dict[str, tuple[str, str]] = {  # how much of what: the words for it
    f"1/1000 {LENGTH}": ("mm", "millimeter millimetre"),
    f"1/100 {LENGTH}": ("cm", "centimeter centimetre"),
    f"1 {LENGTH}": ("m", "meter metre"),
    f"1000 {LENGTH}": ("km", "kilometer kilometre"),
    f"127/5000 {LENGTH}": ("in", "inch inches"),
    f"381/1250 {LENGTH}": ("ft", "foot feet"),
    f"1143/1250 {LENGTH}": ("yd", "yard"),
    f"201168/125 {LENGTH}": ("mi", "mile"),
    f"1/1000 {MASS}": ("mg", "milligram"),
    f"1 {MASS}": ("g", "gram"),
    f"1000 {MASS}": ("kg", "kilogram"),
    f"1 {TIME}": ("s", "sec second"),
    f"60 {TIME}": ("min", "minute"),
    f"3600 {TIME}": ("h", "hr hour"),
    f"86400 {TIME}": ("d", "day"),
    f"604800 {TIME}": ("wk", "week"),
    f"1/1000 {VOLUME}": ("ml", "milliliter millilitre"),
    f"1 {VOLUME}": ("l", "liter litre"),
    f"1/100 {MONEY}": ("cent", "cents"),
    f"1 {MONEY}": ("dollar", "usd"),
    "1 euro": ("euro", "€"),
    "1 pound": ("lb", "pound £"),
    "1 yen": ("yen", "¥"),
    "1 rupee": ("rupee", "₹"),
    "1 degree": ("degree", "deg"),
    "1 unit": ("unit", "unit"),
}
UNITS = {
    word: (Fraction(kind.split()[0]), kind.split()[1])
    for kind, (short, names) in KINDS.items()
    for word in (short, *names.split())
}
# Words that make of a number something else than a number of things.
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
SPELLED = re.compile(r"^\\text\{\s*([-+]?\d[\d.,/]*)\s+([^{}]*)\}$")
WORDED = re.compile(r"^(.+?)\s*\\text\{([^{}]*)\}\s*(?:\^\{?(\d)\}?)?$", re.DOTALL)
SPOKEN = re.compile(
    r"^(.*?(?:[\d)}]|\\pi))\s*([a-zA-Z€£][a-zA-Z€£\s./]*)(?:\^\{?(\d)\}?)?$", re.DOTALL
)
RAISED = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}


def number(text: str) -> Fraction | None:
    """The exact value of a number alone: whole, decimal, repeating, fraction, mixed."""
    text = text.strip().removesuffix("%").strip()
    sign = 1
    while text[:1] in ("-", "+"):
        sign, text = (-sign if text[0] == "-" else sign), text[1:].strip()
    if not text or len(text) > LONGEST or not text.isascii():
        return None
    for read in (decimal, repeating, ratio, power):
        value = read(text)
        if value is not None:
            return sign * value
    return None


def decimal(text: str) -> Fraction | None:
    """12, 1,200.5, 1 200 or .5."""
    match = DECIMAL.match(text)
    if not match or not (match[1] or match[2]):
        return None
    whole = (match[1] or "0").strip()
    if not whole.isdigit():
        if not GROUPED.match(whole):
            return None
        whole = re.sub("[, ]", "", whole)
    return Fraction(f"{whole}.{match[2] or '0'}")


def repeating(text: str) -> Fraction | None:
    r"""0.1\overline{6}, or with dots over its first and last repeating digit."""
    match = REPEATING.match(DOTTED.sub(r"(\1\2\3)", text))
    if not match:
        return None
    whole, start = match[1] or "0", match[2]
    again = next(digits for digits in match.groups()[2:] if digits)
    shift = 10 ** len(start)
    tail = Fraction(int(again), 10 ** len(again) - 1) / shift
    return int(whole) + Fraction(int(start or "0"), shift) + tail


def ratio(text: str) -> Fraction | None:
    r"""\frac{3}{4}, 3/4, 1\frac{3}{4} or 1 3/4."""
    match = OVER.match(text) or SLASH.match(text)
    if not match:
        return None
    try:
        top, bottom = Fraction(match[2]), Fraction(match[3])
    except ValueError:  # two points
        return None
    if not bottom or (match[1] and (top < 0 or bottom < 0)):
        return None
    return int(match[1] or 0) + top / bottom


def power(text: str) -> Fraction | None:
    r"""2.5 \times 10^{3} or 2.5e3."""
    if match := POWER.match(text):
        factor, exponent = match[1] or "1", int(match[2] or match[3])
    elif match := EXPONENT.match(text):
        factor, exponent = match[1], int(match[2])
    else:
        return None
    if abs(exponent) > LARGEST_EXPONENT or factor.count(".") > 1:
        return None
    return Fraction(factor) * Fraction(10) ** exponent


def same_number(ours: str, golds: str) -> bool | None:
    """Whether two numbers are one; None where either is not a number."""
    theirs = number(golds)
    if re.match(r"^-?0,\d+$", golds) and "." in ours:
        theirs = number(golds.replace(",", "."))  # a comma for the point
    mine = number(ours)
    if mine is None or theirs is None:
        return None
    # 28 for 28%, or 28% for 28, is a way of writing; so is 0.28 for 28%.
    percent = ours.endswith("%") != golds.endswith("%")
    scaled = mine / 100 if ours.endswith("%") else mine * 100
    if percent and scaled == theirs:
        return True
    return mine == theirs or rounds(ours, mine, theirs)


def rounds(text: str, mine: Fraction, theirs: Fraction) -> bool:
    """Whether a long decimal is what a calculator prints for an endless one."""
    match = re.match(r"^[-+]?([\d,]*)\.(\d+)$", text)
    if not match or len((match[1] + match[2]).replace(",", "").lstrip("0")) < PRECISE:
        return False
    endless = 10**400 % theirs.denominator != 0
    return endless and abs(mine - theirs) < Fraction(1, 10 ** len(match[2]))


def split_unit(text: str) -> tuple[str, str]:
    """A formula and the unit behind it, as words ("" where there is none)."""
    if text.endswith(r"^\circ") and not TRIGONOMETRIC.search(text):
        return text.removesuffix(r"^\circ").strip(), "degree"
    if match := WORDED.match(SPELLED.sub(r"\1\\text{\2}", text)):
        value, unit, raised = match.groups()
        inner_value, inner = split_unit(value)
        if inner and "/" in value[-3:]:
            value, unit = inner_value, f"{inner} / {unit}"
        known = False
    elif match := SPOKEN.match(text):
        value, unit, raised = match.groups()
        known = True
    else:
        return text, ""
    value = value.rstrip("\\ ")  # of a space before the unit
    parts = re.sub(r"[^\w€£]", " ", unit.lower().replace("/", " per ")).split()
    powers = [RAISED[word] for word in parts if word in RAISED]
    parts = [singular(word) for word in parts if word not in RAISED]
    things = parts and len(parts) <= 4 and not QUALIFIERS & set(parts)
    if any(word.isdigit() for word in parts):
        return text, ""
    if not things or not re.search(r"\d|\\pi|^[a-z]$", value):
        return text, ""
    if known and not all(
        word in UNITS and len(word) > 1 for word in parts if word != "per"
    ):
        return text, ""
    if value.count("(") != value.count(")") or value.count("{") != value.count("}"):
        return text, ""
    exponent = int(raised) if raised else powers[0] if powers else 1
    return value, " ".join(parts) + (f" ^{exponent}" if exponent > 1 else "")


def singular(word: str) -> str:
    """A word without its s, and the short name of a unit."""
    one = word.removesuffix("s") if len(word) > 2 and word not in UNITS else word
    for short, names in KINDS.values():
        if one in (short, *names.split()):
            return short
    return one


def conversion(ours: str, golds: str) -> Fraction | None:
    """How many of the gold unit one of ours is; 0 where their kinds differ, None where
    one is unknown."""
    (one, _, raised), (other, _, gold_raised) = (
        u.partition(" ^") for u in (ours, golds)
    )
    if one not in UNITS or other not in UNITS:
        return None
    (factor, kind), (gold_factor, gold_kind) = UNITS[one], UNITS[other]
    if (kind, raised) != (gold_kind, gold_raised):
        return Fraction(0)
    return (factor / gold_factor) ** int(raised or 1)
