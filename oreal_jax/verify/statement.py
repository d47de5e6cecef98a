"""The answer of a text that marks none: the value that its last statement states.

A number inside a larger expression is not the answer, nor is one that the sentence
denies, bounds, counts from or refers to. So one whole expression (or a list of them) is
read in one of these places, or nothing:

* on GSM8K's line "#### x", or after "answer is" or "answer:";
* alone in the last statement;
* the last statement's computation, as in "so he pays 2 * $3 = $6 for them";
* after the last statement's verb or colon, as in "the area is x";
* as the only formula of the last statement, as in "the point $(3, 8)$".

Remarks without numbers after it ("I hope this is correct.") do not count.
"""

import re

from oreal_jax.verify.numbers import UNITS, short_name
from oreal_jax.verify.verdict import Verdict
from oreal_jax.verify.wording import (
    BEFORE,
    CHANGED,
    DENIED,
    HYPOTHESIS,
    NUMERAL,
    PART_OF,
    QUANTITY,
    SEPARATOR,
    STATED,
    STATED_OR,
    SUBJECT,
    UNKNOWN_CHANGED,
    is_denied,
    is_doubted,
    is_remark,
)

UNCLEAR = Verdict("undecided", "no answer found")
NONE = Verdict("incorrect", "no answer found")

TAIL = 2000  # characters at the end that are read
FIRST = 0xE000  # the character that stands for the first formula of a text
FORMULA = re.compile(
    r"\\\[(.+?)\\\]|\$\$(.+?)\$\$|\\\((.+?)\\\)|(?<![\\$])\$([^$\n]+?)\$(?!\d)",
    re.DOTALL,
)
PROSE = re.compile(r"\b[a-zA-Z]{2,} [a-zA-Z]{2,} [a-zA-Z]{2,}\b")
IN_TEXT = re.compile(r"\\(?:text\w*|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
SPECIAL_TOKEN = re.compile(r"<\|[^|<>]{1,40}\|>")
END_OF_SENTENCE = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)[\s)\"']+")
PHRASE = re.compile(
    r"\banswer\s*(?:is|are|:|=)\s*:?|答案\s*(?:是|为|：|:)", re.IGNORECASE
)
UNSAFE = re.compile(r"[\d\ue000-\uf8ff\u3040-\u30ff\u4e00-\u9fff]")

FUNCTIONS = (
    "sqrt|cbrt|exp|ln|log|sin|cos|tan|sec|csc|cot|arcsin|arccos|arctan|sinh|cosh|tanh"
    "|pi|mod|infinity"
)
WORD = re.compile(
    rf"(?<![\\A-Za-z0-9_^])(?!(?:{FUNCTIONS})(?![A-Za-z]))"
    r"(?:[A-Za-z]{2,}|[\u3040-\u30ff\u4e00-\u9fff]|[aAI](?=\s+[A-Za-z]{2,}|'|\s+\$?\d))"
)
CLAUSE = re.compile(r"\b(?:which|so|thus|therefore|hence)\b|;", re.IGNORECASE)
LEAD = re.compile(
    r"(?:(?:so|thus|therefore|hence|then|finally|now|and|consequently|i\.e\.|that is"
    r"|in (?:total|summary|conclusion)|as a result)\b[,:]?\s*)+",
    re.IGNORECASE,
)
ARTICLE = re.compile(
    r"(?:(?:exactly|simply|just|only|indeed|therefore|thus|then|both|either|equal to"
    r"|given by|a total of|option|choice"
    r"|the (?:number|value|integer|fraction|expression|set|list|option|choice"
    r"|interval|point|pair|ordered pair|function|polynomial|equation|matrix|vector))\b"
    r"[,:]?\s*)+",
    re.IGNORECASE,
)
SOLUTION = re.compile(
    r"(?:is|are) (?:the|our|my) (?:\w+ )?(?:answer|solution|result|total|value)s?\W*",
    re.IGNORECASE,
)
UNIT = re.compile(
    r"(?:(?:square|sq|cubic|cu)\.? )?([A-Za-z]+)(?: ?(?:/|per) ?[A-Za-z]+)?(?:\^\d)?"
)
SQUARE_UNIT = re.compile(r"^(-?[\d,.]+) ?(mm|cm|m|km|in|ft|yd|mi)(\^[23]|[²³])$")
NUMBER = r"(?:\$?\d[\d,]*(?:\.\d+)?|\.\d+)%?"
COMPUTATION = re.compile(
    rf"(?:^|(?<=[A-Za-z.,:;(] ))\(*{NUMBER}\)*(?: [a-z]+)?"
    rf"(?: ?[-+*/×÷−–x] ?\(*{NUMBER}\)*(?: [a-z]+)?)+ ?= ?{NUMBER}(?![\w/^*+])"
)
AND = re.compile(r"(?:and|or|as well as)\s+", re.IGNORECASE)
ARROW = re.compile(r"\\(?:Rightarrow|implies|Longrightarrow|therefore)(?![a-zA-Z])")
SUBJECT_FORMULA = re.compile(r"(?<!\bof )([\ue000-\uf8ff])\s*$")
OPERATORS = "+-*/=<>^_&!\\"


def read(text: str) -> str | Verdict:
    """Return the stated answer, or the verdict on a text without one."""
    formulas: list[str] = []
    statements = split(text, formulas)
    explicit = explicit_answer(statements)
    if explicit is None:
        explicit = last_answer(statements)
    if explicit is None:
        return NONE
    return restored(explicit, formulas) if explicit else UNCLEAR


def split(text: str, formulas: list[str]) -> list[str]:
    """Split off the last sentences; one character stands for each formula."""
    end = text[-TAIL:]
    if len(text) > TAIL and "\n" in end:
        end = end.split("\n", 1)[1]
    end = SPECIAL_TOKEN.sub("\n", end).translate({0x3002: ". ", 0xFF0E: ". "})
    end = re.sub(r"(?<=[\w)])\*\*(?=[\w(])", "^", end)  # a power, not bold
    end = re.sub(r"\*\*|`|[\ue000-\uf8ff]", "", end)

    def replace(match: re.Match) -> str:
        formula = next(group for group in match.groups() if group is not None)
        if "answer" in formula.lower():
            return "\n" + IN_TEXT.sub(r" \1 ", formula) + "\n"
        if match[4] and PROSE.search(IN_TEXT.sub("", formula)):  # between two prices
            return match[0]
        formulas.append(ARROW.split(formula)[-1].strip())
        return chr(FIRST + len(formulas) - 1)

    sentences = []
    for line in FORMULA.sub(replace, end).split("\n"):
        line = line.strip(" \t>*•")
        sentences += [line] if line.startswith("#") else END_OF_SENTENCE.split(line)
    return list(filter(None, map(str.strip, sentences)))


def restored(text: str, formulas: list[str]) -> str:
    """Put formulas in place of the characters that stand for them."""
    restore = lambda match: formulas[ord(match[0]) - FIRST]
    return re.sub(r"[\ue000-\uf8ff]", restore, text)


def explicit_answer(statements: list[str]) -> str | None:
    """Return the value of "#### x" or after "answer is"; "" if unclear."""
    for place in range(len(statements) - 1, -1, -1):
        text, later = statements[place], statements[place + 1 :]
        if phrases := list(PHRASE.finditer(text)):
            value = after_phrase(phrases[-1], later)
        elif text.startswith("####"):
            value = expression(text.lstrip("# "), most_words=0) or None
        else:
            continue
        if value is not None:
            return "" if any(map(DENIED.search, later)) else value
    return None


def after_phrase(phrase: re.Match, later: list[str]) -> str | None:
    """Return the value after a phrase; "" if unclear, None after a remark."""
    before = CLAUSE.split(phrase.string[: phrase.start()])[-1]
    after = phrase.string[phrase.end() :]
    if is_denied(before) or PART_OF.search(before):
        return ""
    value = expression(after, words=True)
    if not value and phrase[0].strip().endswith(":"):
        value = stated(after, labelled=True)
    if not value and later and not after.strip(" .:"):
        value = expression(later[0], words=True)
    return value or (None if is_remark(after) else "")


def last_answer(statements: list[str]) -> str | None:
    """Return the value of the last statement; "" if unclear, None if none."""
    for text in reversed(statements):
        if is_remark(text) or text.startswith("#"):
            continue
        return stated(text)
    return "" if any(map(QUANTITY.search, statements)) else None


def stated(text: str, labelled: bool = False) -> str:
    """Return the value of one statement, which a label may call the answer, or ""."""
    text = text.strip()
    if text.endswith("?") or HYPOTHESIS.match(text):
        return ""
    text = LEAD.sub("", text, count=1) if LEAD.match(text) else text
    if value := computation(text) or expression(text, most_words=1):
        return value
    for separator in reversed(list(SEPARATOR.finditer(text))):
        before = CLAUSE.split(text[: separator.start()])[-1]
        if value := expression(text[separator.end() :]):
            if separator["action"] or separator["label"]:
                unclear = QUANTITY.search(before)  # "5 and sold 3", "step 2: 3"
            else:
                unclear = STATED.search(before)  # "x is 3 and y is 5"
                unclear = unclear or UNKNOWN_CHANGED.search(before)
            if unclear or is_denied(before):
                return ""
            subject = SUBJECT_FORMULA.search(before)  # "$2x$ is 8" is an equation
            return f"{subject[1]} = {value}" if subject else value
    return only_quantity(text, labelled)


def computation(text: str) -> str:
    """Return the last computation with numbers of a statement, or ""."""
    matches = list(COMPUTATION.finditer(text))
    if not matches:
        return ""
    before, after = text[: matches[-1].start()], text[matches[-1].end() :]
    unclear = QUANTITY.search(after) or DENIED.search(text) or NUMERAL.search(after)
    if unclear or STATED_OR.search(after) or re.search(r"\b[A-Za-z] $", before):
        return ""
    text = re.sub(r"(?<=[\d)%]) ?x ?(?=[$(.\d])", "*", matches[-1][0])
    return re.sub(r"[a-z$]|,(?=\d{3})", "", text)


def only_quantity(text: str, labelled: bool) -> str:
    """Return the only formula of a statement, or a labelled only number."""
    if is_doubted(text) or CHANGED.search(text):
        return ""
    pattern = r"[\ue000-\uf8ff]"
    if labelled:
        pattern += r"|\$?\d[\d,./]*\d|\d"
    matches = list(re.finditer(pattern, text))
    if len(matches) != 1 or BEFORE.search(text[: matches[0].start()]):
        return ""
    remaining = text[: matches[0].start()] + text[matches[0].end() :]
    return "" if re.search(r"\d", remaining) else matches[0][0]


def expression(text: str, words: bool = False, most_words: int = 30) -> str:
    """Return the expression or list that a phrase is; "" if it is none.

    Up to `most_words` words may follow, if they do not change its value. With `words`,
    it may be up to three words.
    """
    text = text.strip().lstrip(":=").strip()
    text = text[match.end() :] if (match := ARTICLE.match(text)) else text
    if words and re.fullmatch(r"[A-Za-z]+(?: [A-Za-z]+){0,2}[.]?", text):
        return text
    values = []
    while True:
        word = WORD.search(IN_TEXT.sub(lambda m: "0" * len(m[0]), text))
        end = word.start() if word else len(text)
        chunk, text = text[:end], text[end:]
        bare = chunk.rstrip(" ,.:;(-–—")
        text = chunk[len(bare) :] + text
        if not is_whole(bare):
            return ""
        values.append(bare)
        if not (match := AND.match(text.lstrip(", "))):
            break
        following = text.lstrip(", ")[match.end() :]
        if not QUANTITY.match(following.lstrip("-−+(\\$")):
            break
        text = following
    if len(values) == 1:
        values[0] = SQUARE_UNIT.sub(r"\1\\text{ \2}\3", values[0])
        values, text = with_unit(values[0], text)
    safe = SOLUTION.fullmatch(text.strip()) or is_safe(text, most_words)
    return ", ".join(values) if safe else ""


def is_whole(text: str) -> bool:
    """Return whether a piece of text can be an expression: balanced and complete."""
    if not re.search(r"[\w\ue000-\uf8ff]", text) or text[-1] in OPERATORS:
        return False
    if re.search(r"\d(?:st|nd|rd|th)\b", text):
        return False
    if text.count("(") + text.count("[") != text.count(")") + text.count("]"):
        return False
    return text.count("{") == text.count("}") and "?" not in text


def with_unit(value: str, tail: str) -> tuple[list[str], str]:
    """Return a value with the unit after it, and the text after that."""
    text = tail.lstrip()
    if match := re.match(r"per ?cent\b", text, re.IGNORECASE):
        return [value + "%"], text[match.end() :]
    match = UNIT.match(text)
    unit = short_name(match[1].lower()) if match else ""
    if match and unit in UNITS and unit != "in" and re.search(r"\d", value):
        return [f"{value}\\text{{ {match[0]}}}"], text[match.end() :]
    return [value], tail


def is_safe(tail: str, most_words: int) -> bool:
    """Return whether the words after a value leave it as it is."""
    tail = re.split(r"\b(?:because|since)\b", tail, maxsplit=1)[0]
    if len(tail.split()) > most_words or UNSAFE.search(tail):
        return False
    changed = is_doubted(tail) or CHANGED.search(tail)
    return not changed and not SUBJECT.match(tail.lstrip(" ,"))
