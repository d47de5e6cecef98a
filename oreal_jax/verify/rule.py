"""The rule: is the answer of a completion equal to the gold answer?

Exact text and exact numbers first, then forms that people read and computer algebra
does not (bases, units, lists of words, residues, inequalities), then math-verify's
LaTeX reader in `algebra`. A false "correct" is worse than a false "incorrect", so an
answer that cannot be read, costs too much or is ambiguous is undecided.
"""

import importlib
import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

from oreal_jax.verify import extract
from oreal_jax.verify.guard import SERIES, dangerous, depths
from oreal_jax.verify.numbers import conversion, number, same_number, split_unit
from oreal_jax.verify.spelling import flat, normalised
from oreal_jax.verify.verdict import Verdict

MAX_LENGTH = 1000  # characters of an answer that is read at all
MAX_PARTS = 8  # of lists that are compared part by part

BASE = re.compile(
    r"^\(?([0-9A-Za-z]+)\)?\s*(?:_\s*(?:\{\s*)?(?:\\text\{)?\s*\(?(?:base)?\s*\}?\s*"
    r"|(?:\\text\{)?\s*\(?base\s*\}?\s*)(\w+)\s*\)?\}*$"
)
BASES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
    "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16,
}  # fmt: skip
LETTER_BASES = ("11", "12", "16")  # with letters for digits
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
TEXT = re.compile(r"\\text\{([^{}]*)\}")
LONG_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
FAMILIAR = (  # judged at the start, because the reader learns its grammar then
    r"\frac{x}{2}+\frac{y}{2}", r"-\frac{3\sqrt{2}+1}{4}", r"2^{n-1}\left(n+1\right)",
    r"x=\frac{\pi}{4}+2\pi k", r"\left(\frac{1}{2},\log_{10} 2\right)",
    r"(-\infty,-1]\cup[2,\infty)", r"\begin{pmatrix}1&-2\\0&x\end{pmatrix}",
    r"\{1\pm\sqrt{5},-2\}", r"f(x)=x^{3}-3x+\cos 2x", r"-2\le x<\frac{7}{3}",
    r"36\pi-18\sqrt{3}", r"\binom{n}{k}\cdot k!", r"(2,3),(3,2)", r"e^{2\pi i/3}",
)  # fmt: skip


class Undecided(ValueError):
    """The reason that no comparison should decide."""


def judge(completion: str, gold: str) -> Verdict:
    """Judge a completion by rule. Never raises on any text."""
    answer, reason = extract.answer(completion)
    if answer is None:
        return Verdict("incorrect", reason)
    if len(answer) > MAX_LENGTH:
        return Verdict("incorrect", f"an answer of {len(answer)} characters")
    gold = extract.gold_answer(gold)
    if len(gold) > MAX_LENGTH:
        return Verdict("undecided", "gold answer not understood")
    given, expected = shorten(answer), shorten(gold)
    answer = normalised(answer)
    if not answer:
        return Verdict("incorrect", f"nothing is left of the answer {given}")
    try:
        equal = same(answer, normalised(gold))
    except Undecided as why:
        return Verdict("undecided", str(why))
    except Exception:  # sympy raises anything on formulas without meaning
        equal = None
    if equal is None:
        return Verdict("undecided", f"not understood: {given} against {expected}")
    if equal:
        return Verdict("correct", f"equal: {given}")
    return Verdict("incorrect", f"{given} is not {expected}")


def canonical(answer: str) -> str:
    """One text for answers that differ in spelling or are one number; no algebra."""
    text = normalised(answer[:MAX_LENGTH])
    value = number(flat(text))
    return bare(text) if value is None else str(value)


def warm_up() -> None:
    """Load everything that is otherwise loaded at the first formula."""
    importlib.import_module("sympy.physics.units")  # simplifying imports it late
    for formula in FAMILIAR:
        judge(f"\\boxed{{{formula}}}", "\\frac{x+y}{2}")


def shorten(text: str) -> str:
    """Text for a message."""
    text = " ".join(text.split())
    return text if len(text) <= 40 else text[:37] + "..."


def against(answer: str, gold: str) -> str:
    """Both texts for a message."""
    return f"{shorten(answer)} against {shorten(gold)}"


def same(answer: str, gold: str) -> bool | None:
    """Whether two normalised answers are equal, by the first comparison that decides.

    Raises:
        Undecided: one of them must not be read, or is ambiguous.
    """
    if bare(answer) == bare(gold):
        return True
    for compare in SIMPLE:
        if (equal := compare(answer, gold)) is not None:
            return equal
    for name, text in (("answer", answer), ("gold answer", gold)):
        if danger := dangerous(flat(text)):
            raise Undecided(f"the {name} holds {danger}")
    if SERIES.search(answer) and not SERIES.search(gold):
        raise Undecided("the answer holds a sum, product, integral or limit")
    for compare in COSTLY:
        if (equal := compare(answer, gold)) is not None:
            return equal
    return None


def bare(text: str) -> str:
    """Text without spaces, and words without case; that of single letters matters."""
    text = flat(text)
    joined = re.sub(r"(?<=\d)\s+(?=\d)", "_", text)  # 1 2 is not 12
    joined = "".join(joined.split())
    return joined.lower() if WORDS.match(text) and len(joined) > 1 else joined


def compare_bases(answer: str, gold: str) -> bool | None:
    """Numbers in a base; ten may be left out."""
    first, second = BASE.match(answer), BASE.match(gold)
    if first and second:
        base = lambda match: str(BASES.get(match[2].lower(), match[2]))
        digits, gold_digits = first[1], second[1]
        if re.search(r"\d", digits) or (
            len(digits) > 1 and base(first) in LETTER_BASES
        ):
            digits, gold_digits = digits.upper(), gold_digits.upper()
        return (digits, base(first)) == (gold_digits, base(second))
    match, other = (first, gold) if first else (second, answer)
    if match and re.search(r"\d", match[1]) and match[2] in ("10", "ten"):
        return same_number(match[1], other)
    return None


def compare_choice_with_text(answer: str, gold: str) -> bool | None:
    """A choice and its text, as in (C) 12, with a gold answer that is one of them."""
    match = CHOSEN.match(flat(answer))
    if not match or CHOSEN.match(flat(gold)) or re.search(r"\([A-Z]\)", match[2]):
        return None
    letter = CHOICE.match(gold)
    return match[1] == letter[1].upper() if letter else same(match[2], gold) or None


def compare_numbers(answer: str, gold: str) -> bool | None:
    """Numbers and percentages."""
    percent = lambda text: re.sub(r"\s*(?:percent|pct)$", "%", flat(text))
    return same_number(percent(answer), percent(gold))


def compare_residues(answer: str, gold: str) -> bool | None:
    """Residues with their modulus; one side may give the least residue alone."""
    first, second = RESIDUE.match(flat(answer)), RESIDUE.match(flat(gold))
    if first and second:
        modulus = int(second[2])
        if int(first[2]) != modulus or not modulus:
            return False
        return (int(first[1]) - int(second[1])) % modulus == 0
    match, other = (first, gold) if first else (second, answer)
    value = number(other)
    if value is None or not match or not 0 <= int(match[1]) < int(match[2]):
        return None
    return value == int(match[1])


def compare_times(answer: str, gold: str) -> bool | None:
    """Times of day and ratios; 14:64 and 7:32 are equal only as ratios."""
    first, second = (CLOCK.match(flat(text).lower()) for text in (answer, gold))
    if not first or not second:
        return None
    terms, gold_terms = ([int(n) for n in m[1].split(":")] for m in (first, second))
    if terms == gold_terms:
        if first[2] and second[2]:
            return first[2] == second[2]
        return True if first[2] == second[2] else None
    if len(terms) == len(gold_terms) and all(
        a * gold_terms[0] == b * terms[0]
        for a, b in zip(terms, gold_terms, strict=True)
    ):
        raise Undecided(f"{against(answer, gold)}: a ratio or a time?")
    return False


def compare_words(answer: str, gold: str) -> bool | None:
    """Words, names and multiple choice, one or a list."""
    in_text = r"\text" in answer + gold
    answer, gold = flat(answer), flat(gold)
    first, second = CHOICE.match(answer), CHOICE.match(gold)
    if first and second and (len(answer) > 1 or len(gold) > 1):
        return first[1].upper() == second[1].upper()
    if not WORDS.match(gold) or not WORDS.match(answer):
        return None
    split = lambda text: sorted(
        part.strip(" .()") for part in re.split(r",|&|\band\b", text)
    )
    words, gold_words = split(answer), split(gold)
    if all(len(word) == 1 for word in gold_words):
        return [w.upper() for w in words] == [w.upper() for w in gold_words]
    if len(gold) == 1 or len(answer) == 1:
        return None  # perhaps a variable
    if not in_text and len(answer) <= 3 and len(gold) <= 3:
        return None  # or a product of variables
    return [w.lower() for w in words] == [w.lower() for w in gold_words]


def compare_approximations(answer: str, gold: str) -> bool | None:
    """The exact value before a sign of approximation."""
    if r"\approx" not in answer or r"\approx" in gold:
        return None
    if not same(answer.split(r"\approx", 1)[0].strip(), gold):
        raise Undecided(f"{shorten(answer)} says so only approximately")
    return True


def compare_units(answer: str, gold: str) -> bool | None:
    """Values with units; a unit may be left out."""
    (value, unit), (gold_value, gold_unit) = split_unit(answer), split_unit(gold)
    if not unit and not gold_unit:
        return None
    if not unit or not gold_unit or unit == gold_unit:
        return same(value, gold_value)
    factor = conversion(unit, gold_unit)
    if not factor:
        return None if factor is None else False
    exact, gold_exact = number(flat(value)), number(flat(gold_value))
    if exact is None or gold_exact is None:
        scale = rf"\frac{{{factor.numerator}}}{{{factor.denominator}}}"
        return same(rf"{scale}\cdot({value})", gold_value)
    return exact * factor == gold_exact


def compare_named(answer: str, gold: str) -> bool | None:
    """Values that one side names, as in x = 5 and 5."""
    value, gold_value = named_value(answer), named_value(gold)
    if value == answer and gold_value == gold:
        return None
    if value != answer and gold_value != gold:
        # W(n) = 1 and W(x) = 1 are equal; with letters in the values they need not be.
        constant = r"^(\w+)\s*\(\s*[a-z]\s*\)\s*=\s*((?:\\[a-z]+|[^a-z])+)$"
        first, second = re.match(constant, answer), re.match(constant, gold)
        if not first or not second or first[1] != second[1]:
            return None
        return same(first[2], second[2])
    if not value or not gold_value or "=" in (value + gold_value):
        return None
    unnamed = answer if value == answer else gold
    if re.search(r"[=<>]|\\le\b|\\ge\b|\\ne\b", unnamed):
        return None
    return same(value, gold_value) or None


def named_value(text: str) -> str:
    """The value of a named value; any other text unchanged."""
    match = NAMED.match(text) or NAMED_LAST.match(text)
    return match[1].strip() if match else text


def compare_computations(answer: str, gold: str) -> bool | None:
    """A computation such as 1+1=2, all of whose sides must agree."""
    sides = [side.strip() for side in re.split(r"(?<![<>!\\])=", named_value(answer))]
    if len(sides) < 2 or "=" in gold:
        return None
    if re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", flat(sides[0]))):
        return None
    if not all([same(side, sides[0]) for side in sides[1:]]) or "" in sides:
        raise Undecided("an answer that contradicts itself")
    return same(sides[-1], gold)


class Parts(NamedTuple):
    """A list: its brackets ("" if it has none) and the texts between its commas."""

    brackets: str
    texts: list[str]

    @property
    def ordered(self) -> bool:
        """Whether it is a tuple or an interval."""
        return self.brackets not in ("", r"\{\}")


def compare_lists(answer: str, gold: str) -> bool | None:
    """Sets and lists in any order, tuples in order; each part must have its equal."""
    first, second = parts(answer), parts(gold)
    if first is None or second is None:
        several, single = (first, gold) if first else (second, answer)
        if several and all(number(text) is not None for text in several.texts):
            return None if number(single) is None else False
        return None
    if len(first.texts) != len(second.texts) or len(first.texts) > MAX_PARTS:
        return None
    if first.ordered or second.ordered:
        if first.brackets != second.brackets:
            return None
        pairs = zip(first.texts, second.texts, strict=True)
        return True if all(same(a, b) for a, b in pairs) else None
    remaining = list(first.texts)
    for expected in second.texts:
        match = next((text for text in remaining if same(text, expected)), None)
        if match is None:
            return None
        remaining.remove(match)
    return True


def compare_brackets(answer: str, gold: str) -> bool | None:
    """A set is neither a point nor an interval, whatever its elements are."""
    first, second = parts(answer), parts(gold)
    kinds = {first.brackets, second.brackets} if first and second else set()
    if len(kinds) == 2 and r"\{\}" in kinds and "" not in kinds:
        raise Undecided(f"{against(answer, gold)}: a set?")
    return None


def parts(text: str) -> Parts | None:
    """Split a list at its commas; None for text that is no list."""
    brackets = ""
    for opening, closing in [(r"\{", r"\}"), *("()", "(]", "[)", "[]")]:
        inner = text[len(opening) : -len(closing)]
        enclosed = text.startswith(opening) and text.endswith(closing)
        if enclosed and is_balanced(inner):
            text, brackets = inner, opening + closing
            break
    text = JOINTS.sub(",", text)
    levels = depths(text)
    separators = [i for i, c in enumerate(text) if c in ",;" and levels[i] == 0]
    bounds = itertools.pairwise([-1, *separators, len(text)])
    texts = [part for start, end in bounds if (part := text[start + 1 : end].strip())]
    if len(texts) < 2 or number(text) is not None:
        return None
    return Parts(brackets, texts)


def is_balanced(text: str) -> bool:
    """Whether every bracket is closed, and none before it is opened."""
    levels = depths(text)
    return min(levels) == levels[-1] == 0


def compare_regions(answer: str, gold: str) -> bool | None:
    """Sets of real numbers."""
    from oreal_jax.verify.regions import same_region  # imports sympy, which is slow

    return same_region(answer, gold)


def compare_formulas(answer: str, gold: str) -> bool | None:
    """Formulas; words in them must be equal, because only letters commute."""
    from oreal_jax.verify import algebra  # imports sympy, which is slow

    equal = algebra.same(flat(answer), flat(gold))
    if not equal:
        return equal
    words, gold_words = (sorted(LONG_WORD.findall(flat(t))) for t in (answer, gold))
    anagrams = sorted("".join(words)) == sorted("".join(gold_words))
    if words and gold_words and words != gold_words and anagrams:
        return None
    if has_base(answer) or has_base(gold):
        return None
    if text_words(answer) - text_words(gold) - {"and", "or"}:  # algebra ignores them
        return None
    return True


def text_words(formula: str) -> set[str]:
    r"""The words in \text{...}."""
    return set(re.findall(r"[a-z]+", " ".join(TEXT.findall(formula)).lower()))


def has_base(text: str) -> bool:
    """Whether a number has a subscript, such as a base."""
    return bool(re.search(r"\d\s*_", text))


Comparison = Callable[[str, str], bool | None]
SIMPLE: tuple[Comparison, ...] = (
    compare_bases, compare_choice_with_text, compare_numbers, compare_residues,
    compare_times, compare_words,
)  # fmt: skip
COSTLY: tuple[Comparison, ...] = (
    compare_approximations, compare_units, compare_named, compare_computations,
    compare_lists, compare_regions, compare_brackets, compare_formulas,
)  # fmt: skip
