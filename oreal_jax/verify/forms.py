"""Comparison of forms that people read and computer algebra does not.

Numbers in a base, percentages, residues, times and ratios, words and choices. Each
function returns None for texts that are not of its form.
"""

import re

from oreal_jax.verify.numbers import number, same_number
from oreal_jax.verify.spelling import flat
from oreal_jax.verify.verdict import Undecided

BASE = re.compile(
    r"^\(?([0-9A-Za-z]+)\)?\s*(?:_\s*(?:\{\s*)?(?:\\text\{)?\s*\(?(?:base)?\s*\}?\s*"
    r"|(?:\\text\{)?\s*\(?base\s*\}?\s*)(\w+)\s*\)?\}*$"
)
BASES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
    "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16,
}  # fmt: skip
LETTER_BASES = ("11", "12", "16")  # with letters for digits
RESIDUE = re.compile(
    r"^(?:[a-z]\s*\\equiv\s*)?(-?\d+)\s*(?:\(\s*)?\\?(?:pmod|bmod|mod)\s*\{?\s*(\d+)\s*\}?\)?$"
)
CLOCK = re.compile(r"^(\d+(?:\s*:\s*\d+)+)\s*([ap])?\.?\s*(?:m\.?)?$")
WORDS = re.compile(r"^[A-Za-z][A-Za-z ,.'()&-]*$")
CHOICE = re.compile(r"^(?:\\text\{)?\(?\s*([A-Za-z])\s*\)?[.:]?\}?$")


def compare_bases(answer: str, gold: str) -> bool | None:
    """Compare numbers in a base; ten may be left out."""
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


def compare_numbers(answer: str, gold: str) -> bool | None:
    """Compare numbers and percentages."""
    percent = lambda text: re.sub(r"\s*(?:percent|pct)$", "%", flat(text))
    return same_number(percent(answer), percent(gold))


def compare_residues(answer: str, gold: str) -> bool | None:
    """Compare residues; one side may give the least residue alone."""
    first, second = RESIDUE.match(flat(answer)), RESIDUE.match(flat(gold))
    if first and second:
        modulus = int(second[2])
        if int(first[2]) != modulus or not modulus:
            return False
        return (int(first[1]) - int(second[1])) % modulus == 0
    match, other = (first, gold) if first else (second, answer)
    value = number(flat(other))
    if value is None or not match or not 0 <= int(match[1]) < int(match[2]):
        return None
    return value == int(match[1])


def compare_times(answer: str, gold: str) -> bool | None:
    """Compare times and ratios; 14:64 and 7:32 are equal only as ratios."""
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
        raise Undecided(f"{answer} against {gold}: a ratio or a time?")
    return False


def compare_words(answer: str, gold: str) -> bool | None:
    """Compare words, names and choices, one or a list."""
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
