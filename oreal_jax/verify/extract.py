"""Extraction of the answer from a completion, in time linear in its length.

Only the text after the last thinking marker counts. There the last boxed answer wins
(boxes joined by commas or "and" are one answer, a list), then GSM8K's "#### x", then
"answer is x", then the last number.
"""

import re

THINKING = r"(?:think|thinking|thought|reasoning)>"
END_OF_THINKING = re.compile(
    rf"<conclude>|\*\*Final Answer\*\*|</{THINKING}", re.IGNORECASE
)
START_OF_THINKING = re.compile(f"<{THINKING}", re.IGNORECASE)
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
FINAL = re.compile(r"final answer\s*(?:is|:)", re.IGNORECASE)
PHRASE = re.compile(r"answer\s*(?:is|:|=)\s*:?", re.IGNORECASE)
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")
FORMULA = re.compile(r"\$([^$]+)\$|\\\(([^()]+)\\\)")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
JOINT = re.compile(
    r"\\(?:q?quad|text|mathrm)\b|for (?:part )?\(?[a-z0-9]\)?|[\s$.()\[\]{}\\]"
)
TAIL = 2000  # characters at the end that are searched if nothing is boxed
MAX_JOINT = 60  # characters between boxes of one list
MAX_BOXES = 3  # different boxed answers; more is hedging


def final_text(completion: str) -> str:
    """The text after the last thinking marker; empty while thinking has not ended."""
    end = max((m.end() for m in END_OF_THINKING.finditer(completion)), default=0)
    text = completion[end:]
    return "" if START_OF_THINKING.search(text) else text


def answer(completion: str) -> tuple[str | None, str]:
    """The answer, or None and the reason that there is none."""
    text = final_text(completion)
    boxes = boxed(text)
    if boxes:
        count = len({"".join(box.split()) for box in boxes})
        if count > MAX_BOXES:
            return None, f"{count} different boxed answers"
        end = text[text.rindex("}") :][-TAIL:]
        if FINAL.search(end):  # a statement after the box replaces it
            return after_phrase(end)
        return (boxes[-1], "") if boxes[-1].strip() else (None, "the box is empty")
    if BOX.search(text):
        return None, "the box is not closed"
    tail = text[-TAIL:]
    if "####" in tail:
        return tail.rsplit("####", 1)[1].strip().split("\n")[0].strip(), ""
    if PHRASE.search(tail):
        return after_phrase(tail)
    numbers = NUMBER.findall(tail)
    return (numbers[-1].rstrip(","), "") if numbers else (None, "no answer found")


def after_phrase(text: str) -> tuple[str | None, str]:
    """The answer after the last "answer is"."""
    end = list(PHRASE.finditer(text))[-1].end()
    phrase = plain(text[end:].strip().split("\n")[0])
    return (phrase, "") if phrase else (None, "no answer found")


def gold_answer(gold: str) -> str:
    """The answer in a gold text, which may be a whole solution."""
    if BOX.search(gold) or PHRASE.search(gold) or "####" in gold:
        extracted = answer(gold)[0]
        return BOX.split(gold)[-1] if extracted is None else extracted
    return gold


def boxed(text: str) -> list[str]:
    """The answers in closed boxes, in order; boxes joined as a list are one answer."""
    lists: list[list[str]] = []
    position = 0
    while match := BOX.search(text, position):
        end = closing(text, match.end())
        if end is None:
            break
        if not lists or not is_joint(text[position + 1 : match.start()]):
            lists.append([])
        lists[-1].append(text[match.end() : end])
        position = end
    return [", ".join(dict.fromkeys(boxes)) for boxes in lists]


def is_joint(between: str) -> bool:
    """Whether the text between two boxes makes them one list."""
    if len(between) > MAX_JOINT:
        return False
    return JOINT.sub("", between) in (",", ";", "and", "or", ",and", ",or")


def closing(text: str, start: int) -> int | None:
    """The position of the brace that closes the one opened just before `start`."""
    depth = 1
    for match in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None


def plain(phrase: str) -> str:
    """A phrase without the sentence around it: its one formula, or its one number."""
    sentence = re.split(r"\.(?:\s|$)|\*\*", phrase.strip().lstrip("*"))[0].strip()
    formulas = FORMULA.findall(sentence)
    outside = FORMULA.sub(" ", sentence)
    # Two formulas or numbers in one sentence may be hedging: then all of it is judged.
    if len(formulas) == 1 and not NUMBER.search(outside):
        return formulas[0][0] or formulas[0][1]
    if len(outside.split()) > 3 and len(numbers := NUMBER.findall(outside)) == 1:
        return numbers[0].rstrip(",")
    return sentence
