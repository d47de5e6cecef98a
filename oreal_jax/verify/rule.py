"""The rule: is the answer of a completion equal to the gold answer?

Exact text and exact numbers first, then the forms that people read and computer algebra
does not (bases, units, lists of words, residues, inequalities); what is left goes to
math-verify's LaTeX reader in `algebra`. A false "correct" is worse than a false
"incorrect",
so what cannot be read, would cost too much or could be meant otherwise is undecided.
"""

import importlib
import re
from collections.abc import Callable

from oreal_jax.verify import algebra, extract
from oreal_jax.verify.guard import SERIES, dangerous
from oreal_jax.verify.numbers import conversion, number, same_number, split_unit
from oreal_jax.verify.regions import same_region
from oreal_jax.verify.spelling import flat, normalised
from oreal_jax.verify.verdict import Verdict

LONGEST = 1000  # characters of an answer that is read at all
MOST_PARTS = 8  # of a list that is compared part by part

BASE = re.compile(
    r"^\(?([0-9A-Za-z]+)\)?\s*(?:_\s*(?:\{\s*)?(?:\\text\{)?\s*\(?(?:base)?\s*\}?\s*"
    r"|(?:\\text\{)?\s*\(?base\s*\}?\s*)(\w+)\s*\)?\}*$"
)
BASES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
    "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16,
}  # fmt: skip
LETTERED = ("11", "12", "16")  # bases that have letters for digits
NAME = r"[a-zA-Z\\][\w\\{}'^]*(?:\s*\([^()=]*\))?"
NAMED = re.compile(
    rf"^(?:\\text\{{[^{{}}]*\}}|m?\s*\\angle\s*\w+|{NAME}(?:\s*:\s*{NAME})?)\s*(?:=|\\in\b)(.*)$"
)
NAMED_LAST = re.compile(r"^([^=a-zA-Z]+)=\s*[a-zA-Z]$")
RESIDUE = re.compile(
    r"^(?:[a-z]\s*\\equiv\s*)?(-?\d+)\s*(?:\(\s*)?\\?(?:pmod|bmod|mod)\s*\{?\s*(\d+)\s*\}?\)?$"
)
CLOCK = re.compile(r"^(\d+(?:\s*:\s*\d+)+)\s*([ap])?\.?\s*(?:m\.?)?$")
WORDS = re.compile(r"^[A-Za-z][A-Za-z ,.'()&-]*$")
CHOICE = re.compile(r"^(?:\\text\{)?\(?\s*([A-Za-z])\s*\)?[.:]?\}?$")
CHOSEN = re.compile(r"^\(([A-Z])\)[\s.:]*([^\s.:].*)$")
JOINTS = re.compile(
    r"\\text\{\s*,?\s*(?:and|or)\s*\}|\b(?:and|or)\b|(?<=[\d)}])(?:and|or)(?=[A-Za-z(\\])"
)
SAID_IN = re.compile(r"\\text\{([^{}]*)\}")
LONG_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")


FAMILIAR = (
    r"\frac{x}{2}+\frac{y}{2}",
    r"-\frac{3\sqrt{2}+1}{4}",
    r"2^{n-1}\left(n+1\right)",
    r"x=\frac{\pi}{4}+2\pi k",
    r"\left(\frac{1}{2},\log_{10} 2\right)",
    r"(-\infty,-1]\cup[2,\infty)",
    r"\begin{pmatrix}1&-2\\0&x\end{pmatrix}",
    r"\{1\pm\sqrt{5},-2\}",
    r"f(x)=x^{3}-3x+\cos 2x",
    r"-2\le x<\frac{7}{3}",
    r"36\pi-18\sqrt{3}",
    r"\binom{n}{k}\cdot k!",
    r"(2,3),(3,2)",
    r"e^{2\pi i/3}",
)


class Unsure(ValueError):
    """Why it is better to decide nothing."""


def judge(completion: str, gold: str) -> Verdict:
    """Judges a completion by rule. Never raises on any text."""
    found, why = extract.answer(completion)
    if found is None:
        return Verdict("incorrect", why)
    if len(found) > LONGEST:
        return Verdict("incorrect", f"an answer of {len(found)} characters")
    gold = extract.gold_answer(gold)
    if len(gold) > LONGEST:
        return Verdict("undecided", "gold answer not understood")
    shown = f"{shortened(found)} is not {shortened(gold)}"
    ours, golds = normalised(found), normalised(gold)
    if not ours:
        return Verdict("incorrect", f"nothing is left of the answer {shortened(found)}")
    try:
        equal = same(ours, golds)
    except Unsure as why_not:
        return Verdict("undecided", str(why_not))
    except Exception:  # sympy raises anything on formulas without a meaning
        equal = None
    if equal is None:
        shown = f"{shortened(found)} against {shortened(gold)}"
        return Verdict("undecided", f"not understood: {shown}")
    return (
        Verdict("correct", f"equal: {shortened(found)}")
        if equal
        else Verdict("incorrect", shown)
    )


def canonical(answer: str) -> str:
    """One name for what differs in spelling or is the same number; no algebra."""
    text = normalised(answer[:LONGEST])
    exact = number(flat(text))
    return bare(text) if exact is None else str(exact)


def warm_up() -> None:
    """Loads what is otherwise loaded at the first formula."""
    importlib.import_module("sympy.physics.units")  # simplifying does, late
    for formula in FAMILIAR:  # the reader learns its grammar as it goes
        judge(f"\\boxed{{{formula}}}", "\\frac{x+y}{2}")


def shortened(text: str) -> str:
    """Text for a message."""
    text = " ".join(text.split())
    return text if len(text) <= 40 else text[:37] + "..."


def same(ours: str, golds: str) -> bool | None:
    """Whether two normalised answers are equal: the first rule that knows.

    Raises:
        Unsure: one of them is better not read, or may be meant otherwise.
    """
    if bare(ours) == bare(golds):
        return True
    for rule in CHEAP:
        equal = rule(ours, golds)
        if equal is not None:
            return equal
    for text, whose in ((ours, "answer"), (golds, "gold answer")):
        danger = dangerous(flat(text))
        if danger:
            raise Unsure(f"the {whose} holds {danger}")
    if SERIES.search(ours) and not SERIES.search(golds):
        raise Unsure("the answer holds a sum, product, integral or limit")
    for rule in DEEP:
        equal = rule(ours, golds)
        if equal is not None:
            return equal
    return None


def bare(text: str) -> str:
    """Text without spaces; the case of single letters matters, of words not."""
    text = flat(text)
    joined = re.sub(r"(?<=\d)\s+(?=\d)", "_", text)  # 1 2 is not 12
    joined = "".join(joined.split())
    return joined.lower() if WORDS.match(text) and len(joined) > 1 else joined


def by_base(ours: str, golds: str) -> bool | None:
    """Numbers in a base, of which ten may go unsaid."""
    one, other = BASE.match(ours), BASE.match(golds)
    if not one and not other:
        return None
    if one and other:
        base = lambda match: str(BASES.get(match[2].lower(), match[2]))
        mine, theirs = one[1], other[1]
        if re.search(r"\d", mine) or (len(mine) > 1 and base(one) in LETTERED):
            mine, theirs = mine.upper(), theirs.upper()
        return (mine, base(one)) == (theirs, base(other))
    told, plain = (one, golds) if one else (other, ours)
    if told and re.search(r"\d", told[1]) and told[2] in ("10", "ten"):
        return same_number(told[1], plain)
    return None


def by_choice(ours: str, golds: str) -> bool | None:
    """A choice with what it stands for, as in (C) 12, against either of them."""
    match = CHOSEN.match(flat(ours))
    if not match or CHOSEN.match(flat(golds)) or re.search(r"\([A-Z]\)", match[2]):
        return None
    gold = CHOICE.match(golds)
    return match[1] == gold[1].upper() if gold else same(match[2], golds) or None


def by_number(ours: str, golds: str) -> bool | None:
    """Numbers; the gold answer's name, if it has one, is the answer's."""
    ours, golds = flat(ours), flat(golds)
    ours = re.sub(r"\s*(?:percent|pct)$", "%", ours)
    golds = re.sub(r"\s*(?:percent|pct)$", "%", golds)
    return same_number(ours, golds)


def by_residue(ours: str, golds: str) -> bool | None:
    """Residues with their modulus; a residue alone is written like a number."""
    one, other = RESIDUE.match(flat(ours)), RESIDUE.match(flat(golds))
    if not one and not other:
        return None
    if one and other:
        modulus = int(other[2])
        if int(one[2]) != modulus or not modulus:
            return False
        return (int(one[1]) - int(other[1])) % modulus == 0
    told, plain = (one, golds) if one else (other, ours)
    exact = number(plain)
    if exact is None or not told or not 0 <= int(told[1]) < int(told[2]):
        return None
    return exact == int(told[1])


def by_clock(ours: str, golds: str) -> bool | None:
    """Times of day and ratios; 14:64 against 7:32 is for others to say."""
    one, other = (CLOCK.match(flat(text).lower()) for text in (ours, golds))
    if not one or not other:
        return None
    mine, theirs = ([int(n) for n in m[1].split(":")] for m in (one, other))
    if mine == theirs:
        return True if one[2] == other[2] else (False if one[2] and other[2] else None)
    scaled = len(mine) == len(theirs) and all(
        a * theirs[0] == b * mine[0] for a, b in zip(mine, theirs, strict=True)
    )
    if scaled:
        raise Unsure(
            f"{shortened(ours)} against {shortened(golds)}: a ratio or a time?"
        )
    return False


def by_words(ours: str, golds: str) -> bool | None:
    """Words, names and multiple choice, one or a list."""
    worded = r"\text" in ours + golds
    ours, golds = flat(ours), flat(golds)
    one, other = CHOICE.match(ours), CHOICE.match(golds)
    if one and other and (len(ours) > 1 or len(golds) > 1):
        return one[1].upper() == other[1].upper()
    if not WORDS.match(golds) or not WORDS.match(ours):
        return None
    choices = lambda text: sorted(
        part.strip(" .()") for part in re.split(r",|&|\band\b", text)
    )
    mine, theirs = choices(ours), choices(golds)
    if all(len(part) == 1 for part in theirs):
        return [c.upper() for c in mine] == [c.upper() for c in theirs]
    if len(golds) == 1 or len(ours) == 1:
        return None  # a variable, perhaps
    if not worded and len(ours) <= 3 and len(golds) <= 3:
        return None  # or a product of them
    return [c.lower() for c in mine] == [c.lower() for c in theirs]


def by_name(ours: str, golds: str) -> bool | None:
    """The value of what only one of them names, as in x = 5 against 5."""
    one, other = value(ours), value(golds)
    if one == ours and other == golds:
        return None
    if one != ours and other != golds:
        # W(n) = 1 and W(x) = 1 are one; with letters behind they need not be.
        constant = r"^(\w+)\s*\(\s*[a-z]\s*\)\s*=\s*((?:\\[a-z]+|[^a-z])+)$"
        one, other = re.match(constant, ours), re.match(constant, golds)
        return same(one[2], other[2]) if one and other and one[1] == other[1] else None
    if not one or not other or "=" in (one + other):
        return None
    if re.search(r"[=<>]|\\le\b|\\ge\b|\\ne\b", ours if one == ours else golds):
        return None
    return same(one, other) or None


def value(text: str) -> str:
    """The other side of a named value; other text as it is."""
    match = NAMED.match(text) or NAMED_LAST.match(text)
    return match[1].strip() if match else text


def by_unit(ours: str, golds: str) -> bool | None:
    """Values with units; a unit may go unsaid."""
    (mine, unit), (theirs, gold_unit) = split_unit(ours), split_unit(golds)
    if not unit and not gold_unit:
        return None
    if not unit or not gold_unit or unit == gold_unit:
        return same(mine, theirs)
    factor = conversion(unit, gold_unit)
    if not factor:
        return None if factor is None else False
    scale = rf"\frac{{{factor.numerator}}}{{{factor.denominator}}}"
    exact, golds_exact = number(flat(mine)), number(flat(theirs))
    if exact is None or golds_exact is None:
        return same(rf"{scale}\cdot({mine})", theirs)
    return exact * factor == golds_exact


def by_exact(ours: str, golds: str) -> bool | None:
    """What is said exactly before a sign of approximation."""
    if r"\approx" not in ours or r"\approx" in golds:
        return None
    if not same(ours.split(r"\approx", 1)[0].strip(), golds):
        raise Unsure(f"{shortened(ours)} says so only approximately")
    return True


def by_chain(ours: str, golds: str) -> bool | None:
    """A computation such as 1+1=2, all of whose sides must agree."""
    sides = [side.strip() for side in re.split(r"(?<![<>!\\])=", value(ours))]
    if (
        len(sides) < 2
        or "=" in golds
        or re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", flat(sides[0])))
    ):
        return None
    agree = [same(side, sides[0]) for side in sides[1:]]
    if not all(agree) or any(side == "" for side in sides):
        raise Unsure("an answer that contradicts itself")
    return same(sides[-1], golds)


def by_parts(ours: str, golds: str) -> bool | None:
    """Lists in any order and tuples in theirs, where every part has its equal."""
    mine, theirs = parts(ours), parts(golds)
    if mine is None and theirs is None:
        return None
    if mine is None or theirs is None:
        several, one = (mine, golds) if mine else (theirs, ours)
        numbers = several and all(number(part) is not None for part in several[1])
        return False if numbers and number(one) is not None else None
    if len(mine[1]) != len(theirs[1]) or len(mine[1]) > MOST_PARTS:
        return None
    unordered = [kind in ("", r"\{\}") for kind in (mine[0], theirs[0])]
    if mine[0] != theirs[0] and not all(unordered):
        return None
    if not all(unordered):
        pairs = zip(mine[1], theirs[1], strict=True)
        return True if all(same(a, b) for a, b in pairs) else None
    left = list(mine[1])
    for gold in theirs[1]:
        match = next((part for part in left if same(part, gold)), None)
        if match is None:
            return None
        left.remove(match)
    return True


def by_brackets(ours: str, golds: str) -> bool | None:
    """A set is neither a point nor an interval, whatever stands in it."""
    mine, theirs = parts(ours), parts(golds)
    kinds = {mine[0], theirs[0]} if mine and theirs else set()
    if len(kinds) == 2 and r"\{\}" in kinds and "" not in kinds:
        raise Unsure(f"{shortened(ours)} against {shortened(golds)}: a set?")
    return None


def parts(text: str) -> tuple[str, list[str]] | None:
    """The brackets around a list ("" for none), and what is between its commas."""
    kind = ""
    for opening, ending in (
        (r"\{", r"\}"),
        ("(", ")"),
        ("(", "]"),
        ("[", ")"),
        ("[", "]"),
    ):
        inner = text[len(opening) : -len(ending)]
        if text.startswith(opening) and text.endswith(ending) and balanced(inner):
            text, kind = inner, opening + ending
            break
    text = JOINTS.sub(",", text)
    found, depth, start = [], 0, 0
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if sign in ",;" and depth == 0:
            found.append(text[start:place].strip())
            start = place + 1
    found = [part for part in (*found, text[start:].strip()) if part]
    if len(found) < 2 or number(text) is not None:
        return None
    return kind, found


def balanced(text: str) -> bool:
    """Whether no bracket is closed before it is opened."""
    depth = 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if depth < 0:
            return False
    return depth == 0


def by_algebra(ours: str, golds: str) -> bool | None:
    """Formulas; words in them must be the same, for letters commute and words not."""
    equal = algebra.same(flat(ours), flat(golds))
    if equal:
        mine, theirs = (sorted(LONG_WORD.findall(flat(t))) for t in (ours, golds))
        if (
            mine
            and theirs
            and mine != theirs
            and sorted("".join(mine)) == sorted("".join(theirs))
        ):
            return None
        if has_base(ours) or has_base(golds):
            return None
        if said(ours) - said(golds) - {"and", "or"}:  # the algebra passes over words
            return None
    return equal


def said(text: str) -> set[str]:
    """The words in a formula."""
    return set(re.findall(r"[a-z]+", " ".join(SAID_IN.findall(text)).lower()))


def has_base(text: str) -> bool:
    """Whether a number carries a subscript, such as a base."""
    return bool(re.search(r"\d\s*_", text))


Rule = Callable[[str, str], bool | None]
CHEAP: tuple[Rule, ...] = (
    by_base, by_choice, by_number, by_residue, by_clock, by_words,
)  # fmt: skip
DEEP: tuple[Rule, ...] = (
    by_exact, by_unit, by_name, by_chain, by_parts, same_region, by_brackets,
    by_algebra,
)  # fmt: skip
