"""Extraction of the answer from a completion, in time linear in its length.

Only the text after thinking counts. There the last marked answer wins: a box, <answer>
tags, or the sentences "Final Answer: The final answer is x". Boxes joined by commas or
words ("x=3 or x=5") are one answer, a list. Where nothing is marked, `statement` reads
the end of the text.
"""

import re
from typing import NamedTuple

from oreal_jax.verify import statement
from oreal_jax.verify.verdict import Verdict

NAME = r"(?:\w{1,20}:)?(?:think|thinking|thought|reasoning)"
START_OF_THINKING = re.compile(
    rf"<{NAME}>|\[THINK\]|◁think▷|<\|begin_of_thought\|>", re.IGNORECASE
)
END_OF_THINKING = re.compile(
    rf"<conclude>|</{NAME}>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>", re.IGNORECASE
)
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
TAG = re.compile("<(/?)answer>", re.IGNORECASE)
HEADING = re.compile(r"\*\*Final Answer\b|^#+ *Final Answer\b", re.I | re.M)
FINAL_ANSWER = re.compile(
    r"final answer:[\s*]*the final answer is\b[^\n]*?(?:[.!](?=\s)|$)", re.I | re.M
)
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# What may stand between boxes of one list, next to one comma, "and" or "or".
VARIABLE = r"[a-zA-Z](?:_\{?\w\}?)?(?:\([a-z]\))?"
FILLER = re.compile(
    rf"\\(?:q?quad|text|mathrm|mbox)\b|\bfor (?:part )?\(?[a-z0-9]\)?|{VARIABLE}\s*="
    r"|\b(?:the|other|another|second|third|also|is|are|root|solution|value)\b"
    r"|[\s$.()\[\]{}\\]"
)
JOINT = re.compile("[,;]|[,;]?(?:and|or|&|aswellas)")
UNIT_JOINT = re.compile(r"\W*(?!so|not|then|thus|hence)[a-z]+\W+(?:and|or)\W*")
BOX_NAME = re.compile(rf"(?<!\w)({VARIABLE})\s*=[\s$\\({{]*$")
MAX_JOINT = 60  # characters between boxes of one list
MAX_BOXES = 3  # different answers; more is hedging
NO_ANSWER = re.compile(
    r"|see .*|refer to .*|(?:the |a )?proofs?(?: .*)?|(?:to be )?prove[dn]?|q ?e ?d"
    r"|(?:the )?(?:answer|solution)? ?(?:is )?not ?"
    r"(?:found|available|applicable|given|provided|extracted)(?: .*)?"
    r"|(?:none|nothing) (?:found|available|given|provided)|unavailable|omitted|unknown"
    r"|(?:can ?not|could not|unable to) (?:be )?(?:extract|find|found|parse).*"
    r"|(?:no|missing) (?:final )?answer(?: .*)?|answer|solution|explanation"
    r"|n a|nan|null|tbd|todo"
    r"|left (?:to the reader|as an exercise).*|as (?:above|shown|required)"
)
IGNORED = re.compile(r"\\(?:text\w*|mathrm|mathbf|mbox|square|blacksquare|Box|qed)\b")


class Mark(NamedTuple):
    """A marked answer: where it begins and ends, and its text."""

    start: int
    end: int
    text: str


def is_thinking_mark(text: str) -> bool:
    """Return whether a token begins or ends thinking."""
    return any(
        pattern.fullmatch(text) for pattern in (START_OF_THINKING, END_OF_THINKING)
    )


def final_text(completion: str) -> str:
    """Return the text after thinking; empty if thinking has not ended."""
    end = max((m.end() for m in END_OF_THINKING.finditer(completion)), default=0)
    text = completion[end:]
    return "" if START_OF_THINKING.search(text) else text


def answer(completion: str) -> str | Verdict:
    """Return the answer, or the verdict on a completion without one."""
    text = final_text(completion)
    headings = [match.end() for match in HEADING.finditer(text)]
    lists = mark_lists(text[headings[-1] :]) if headings else []
    start = headings[-1] if lists else 0
    lists = lists or mark_lists(text)
    if lists:
        answers = [join(text[start:], marks) for marks in lists]
        count = len({"".join(text.split()) for text in answers})
        if count > MAX_BOXES:
            return Verdict("incorrect", f"{count} different boxed answers")
        last = final_sentence(text[start + lists[-1][-1].end :]) or answers[-1]
        return last if last.strip() else Verdict("incorrect", "the box is empty")
    if BOX.search(text):
        return Verdict("incorrect", "the box is not closed")
    return statement.read(text)


def final_sentence(text: str) -> str | None:
    """Return what follows "Final Answer: The final answer is", if one value."""
    sentences = FINAL_ANSWER.findall(text)
    stated = statement.read(sentences[-1]) if sentences else None
    return stated if isinstance(stated, str) else None


def gold_answer(gold: str) -> str:
    """Return the answer in a gold text, which may be a whole solution."""
    if lists := mark_lists(gold):
        return join(gold, lists[-1])
    if "####" in gold:
        return gold.rsplit("####", 1)[1].strip()
    if BOX.search(gold):
        return BOX.split(gold)[-1]
    stated = final_sentence(gold)
    if stated is None and statement.PHRASE.search(gold):
        stated = statement.read(gold)
    return stated if isinstance(stated, str) else gold


def has_answer(gold: str) -> bool:
    """Return whether a gold text is an answer, rather than "proof" or "not found"."""
    text = IGNORED.sub(" ", gold_answer(gold))
    if re.search(r"[\d\\+\-=<>^]|[^\x00-\x7f]", text):
        return True
    return not NO_ANSWER.fullmatch(" ".join(re.findall("[a-z]+", text.lower())))


def marked_answers(text: str) -> list[str]:
    """Return the marked answers in order; joined boxes are one answer."""
    return [join(text, marks) for marks in mark_lists(text)]


def mark_lists(text: str) -> list[list[Mark]]:
    """Return boxes and tags without boxes; those joined to a list together."""
    marks = boxes(text)
    tagged = [
        tag
        for tag in tags(text)
        if not any(tag.start <= box.start < tag.end for box in marks)
    ]
    lists: list[list[Mark]] = []
    for mark in sorted(marks + tagged):
        if not lists or not is_joint(text[lists[-1][-1].end : mark.start]):
            lists.append([])
        lists[-1].append(mark)
    return lists


def boxes(text: str) -> list[Mark]:
    """Return the closed boxes."""
    marks, position = [], 0
    while match := BOX.search(text, position):
        end = closing(text, match.end())
        if end is None:
            break
        marks.append(Mark(match.start(), end + 1, text[match.end() : end]))
        position = end
    return marks


def tags(text: str) -> list[Mark]:
    """Return the texts in <answer> tags; the last may be open."""
    marks, opening = [], None
    for match in TAG.finditer(text):
        if match[1] and opening:
            content = text[opening.end() : match.start()]
            marks.append(Mark(opening.start(), match.end(), tag_answer(content)))
        opening = None if match[1] else match
    if opening:
        content = text[opening.end() :]
        marks.append(Mark(opening.start(), len(text), tag_answer(content)))
    return marks


def tag_answer(content: str) -> str:
    """Return what a sentence in tags states; any other content as it is."""
    stated = statement.read(content)
    return stated if isinstance(stated, str) else content


def join(text: str, marks: list[Mark]) -> str:
    """Return the answer of joined marks, with the names of several variables."""
    if len(marks) == 1:
        return marks[0].text
    names = [BOX_NAME.search(text[max(0, m.start - 20) : m.start]) for m in marks]
    parts = [mark.text for mark in marks]
    if len({match and match[1] for match in names}) > 1 and all(names):
        parts = [f"{n and n[1]}={part}" for n, part in zip(names, parts, strict=True)]
    return ", ".join(dict.fromkeys(parts))


def is_joint(between: str) -> bool:
    """Return whether the text between two boxes makes them one list."""
    if len(between) > MAX_JOINT:
        return False
    text = FILLER.sub("", between.lower())
    return not between or bool(JOINT.fullmatch(text) or UNIT_JOINT.fullmatch(between))


def closing(text: str, start: int, brackets: re.Pattern = BRACE) -> int | None:
    """Return where the bracket that is opened just before `start` closes."""
    depth = 1
    for match in brackets.finditer(text, start):
        depth += {"{": 1, "(": 1, "}": -1, ")": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None
