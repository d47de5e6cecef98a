"""The rule: is the answer of a completion equal to the gold answer?

Exact text and exact numbers first, then forms that people read and computer algebra
does not (`forms`, `lists`, `regions`), then math-verify's LaTeX reader in `algebra`. A
false "correct" is worse than a false "incorrect", so an answer that cannot be read,
costs too much or is ambiguous is undecided.
"""

import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from oreal_jax.verify import extract
from oreal_jax.verify.forms import (
    CHOICE,
    WORDS,
    compare_bases,
    compare_numbers,
    compare_residues,
    compare_times,
    compare_words,
)
from oreal_jax.verify.guard import SERIES, dangerous
from oreal_jax.verify.lists import Parts, parts
from oreal_jax.verify.numbers import conversion, number, split_unit
from oreal_jax.verify.spelling import flat, normalised
from oreal_jax.verify.verdict import Undecided, Verdict

MAX_LENGTH = 1000  # characters of an answer that is read at all
MAX_PARTS = 8  # of lists that are compared part by part

NAME = r"(?![a-z]{2}\s*=)[a-zA-Z\\][\w\\{}']*(?:\^\{-1\})?(?:\s*\([^()=]*\))?"
NAMED = re.compile(
    rf"^(?:\\text\{{[^{{}}]*\}}|m?\s*\\angle\s*\w+|{NAME}(?:\s*:\s*{NAME})?)\s*(?:=|\\in\b)(.*)$"
)
NAMED_LAST = re.compile(r"^([^=a-zA-Z]+)=\s*[a-zA-Z]$")
VARIABLE = re.compile(r"^([a-zA-Z])(?:_\w)?\s*=")
CHOSEN = re.compile(r"^(?:\(([A-Z])\)[\s.:]*|([A-Z])(?:\)\s*|[.:]\s+))([^\s.:].*)$")
HEDGED = re.compile(
    r"\([A-Z]\)|\b[A-Z][.:)]|\b(?:or|and|not)\s+\(?[A-Z]\b|\b(?:wrong|incorrect)\b"
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


def by_rule(completion: str, prompt: Mapping[str, Any]) -> Verdict:
    """Judge a completion of a prompt by rule."""
    return judge(completion, prompt["gold_answer"])


def judge(completion: str, gold: str) -> Verdict:
    """Judge a completion by rule. Never raises on any text."""
    answer = extract.answer(completion)
    if isinstance(answer, Verdict):
        return answer
    if len(answer) > MAX_LENGTH:
        return Verdict("incorrect", f"an answer of {len(answer)} characters")
    if not extract.has_answer(gold):
        return Verdict("undecided", f"the gold text {shorten(gold)!r} is no answer")
    gold = extract.gold_answer(gold)
    if len(gold) > MAX_LENGTH:
        return Verdict("undecided", "gold answer not understood")
    messages = shorten(answer), shorten(gold)
    answer = normalised(answer)
    if not answer:
        return Verdict("incorrect", f"nothing is left of the answer {messages[0]}")
    try:
        equal = same(answer, normalised(gold))
    except Undecided as why:
        return Verdict("undecided", str(why))
    except Exception:  # sympy raises anything on formulas without meaning
        equal = None
    if equal is None:
        return Verdict("undecided", "not understood: {} against {}".format(*messages))
    if equal:
        return Verdict("correct", f"equal: {messages[0]}")
    return Verdict("incorrect", "{} is not {}".format(*messages))


def canonical(answer: str) -> str:
    """Return one text for answers that differ in spelling or are one number."""
    text = normalised(answer[:MAX_LENGTH])
    value = number(flat(text))
    return bare(text) if value is None else str(value)


def warm_up() -> None:
    """Load everything that is otherwise loaded at the first formula."""
    importlib.import_module("sympy.physics.units")  # simplifying imports it late
    for formula in FAMILIAR:
        judge(f"\\boxed{{{formula}}}", "\\frac{x+y}{2}")


def shorten(text: str) -> str:
    """Shorten text for a message."""
    text = " ".join(text.split())
    return text if len(text) <= 40 else text[:37] + "..."


def same(answer: str, gold: str) -> bool | None:
    """Return whether normalised answers are equal; the first comparison decides.

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
    """Return text without spaces, and words without case."""
    text = flat(text)
    joined = re.sub(r"(?<=\d)\s+(?=\d)", "_", text)  # 1 2 is not 12
    joined = "".join(joined.split())
    return joined.lower() if WORDS.match(text) and len(joined) > 1 else joined


def compare_choice_with_text(answer: str, gold: str) -> bool | None:
    """Compare a choice with text, as (C) 12 or "C: no", to one of the two."""
    first, second = CHOSEN.match(flat(answer)), CHOSEN.match(flat(gold))
    match, other = (first, gold) if first else (second, answer)
    if not match or (first and second) or HEDGED.search(match[3]):
        return None
    if letter := CHOICE.match(other):
        return (match[1] or match[2]) == letter[1].upper()
    return same(match[3], other) or None


def compare_approximations(answer: str, gold: str) -> bool | None:
    """Compare the exact value before a sign of approximation."""
    if r"\approx" not in answer or r"\approx" in gold:
        return None
    if not same(answer.split(r"\approx", 1)[0].strip(), gold):
        raise Undecided(f"{shorten(answer)} is only approximate")
    return True


def compare_units(answer: str, gold: str) -> bool | None:
    """Compare values with units; a unit may be left out."""
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
    """Compare values that one side names, as in x = 5 and 5."""
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
    """Return the value of a named value; any other text unchanged."""
    match = NAMED.match(text) or NAMED_LAST.match(text)
    return match[1].strip() if match else text


def compare_computations(answer: str, gold: str) -> bool | None:
    """Compare a computation such as 1+1=2, all of whose sides must agree."""
    sides = [side.strip() for side in re.split(r"(?<![<>!\\])=", named_value(answer))]
    if len(sides) < 2 or "=" in gold:
        return None
    if re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", flat(sides[0]))):
        return None
    if "" not in sides and (equal := same(sides[-1], gold)) is False:
        return equal
    if "" in sides or not all([same(side, sides[0]) for side in sides[1:]]):
        raise Undecided("an answer that contradicts itself")
    return same(sides[-1], gold)


def compare_lists(answer: str, gold: str) -> bool | None:
    """Compare sets and lists in any order, tuples in order."""
    first, second = parts(answer), parts(gold)
    if first is None or second is None:
        several, single = (first, gold) if first else (second, answer)
        if several and all(number(text) is not None for text in several.texts):
            return None if number(single) is None else False
        return None
    if len(first.texts) != len(second.texts) or len(first.texts) > MAX_PARTS:
        return None
    in_order = all(map(same, first.texts, second.texts))
    if first.ordered or second.ordered:
        return True if in_order and first.brackets == second.brackets else None
    names = len(variables(first)), len(variables(second))
    has_order = in_order and not (max(names) > 1 and r"\pm" in answer + gold)
    if not has_order and names[0] != names[1]:
        raise Undecided(f"{answer} against {gold}: which value is which?")
    return in_order or same_in_any_order(first.texts, second.texts) or None


def same_in_any_order(texts: list[str], golds: list[str]) -> bool:
    """Return whether each text has a gold text of its own that it equals."""
    remaining = list(texts)
    for expected in golds:
        match = next((text for text in remaining if same(text, expected)), None)
        if match is None:
            return False
        remaining.remove(match)
    return True


def variables(listed: Parts) -> set[str]:
    """Return the variables that the parts name, if they name several."""
    names = {match[1] for text in listed.texts if (match := VARIABLE.match(text))}
    return names if len(names) > 1 else set()


def compare_brackets(answer: str, gold: str) -> bool | None:
    """Refuse to compare a set to a point or an interval."""
    first, second = parts(answer), parts(gold)
    if not first or not second or first.ordered == second.ordered:
        return None
    unordered = second if first.ordered else first
    if unordered.brackets or r"\pm" in answer + gold:
        raise Undecided(f"{answer} against {gold}: a set?")
    return None


def compare_regions(answer: str, gold: str) -> bool | None:
    """Compare sets of real numbers."""
    from oreal_jax.verify.regions import same_region  # imports sympy, which is slow

    return same_region(answer, gold)


def compare_formulas(answer: str, gold: str) -> bool | None:
    """Compare formulas; words in them must be equal, for only letters commute."""
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
    r"""Return the words in \text{...}."""
    return set(re.findall(r"[a-z]+", " ".join(TEXT.findall(formula)).lower()))


def has_base(text: str) -> bool:
    """Return whether a number has a subscript, such as a base."""
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
