"""Finding the answer in a completion, in time linear in its length.

Only the text after the last thinking marker counts. There the last boxed answer wins
(boxes joined by commas or "and" are one answer, a list), then GSM8K's "#### x", then
"answer is x", then the last number.
"""

import re

THINKING = r"(?:think|thinking|thought|reasoning)>"
MARKER = re.compile(rf"<conclude>|\*\*Final Answer\*\*|</{THINKING}", re.IGNORECASE)
STILL_THINKING = re.compile(f"<{THINKING}", re.IGNORECASE)
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
FINAL = re.compile(r"final answer\s*(?:is|:)", re.IGNORECASE)
SAID = re.compile(r"answer\s*(?:is|:|=)\s*:?", re.IGNORECASE)
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")
TAIL = 2000  # characters at the end that are searched where nothing is boxed
FORMULA = re.compile(r"\$([^$]+)\$|\\\(([^()]+)\\\)")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
JOINT = re.compile(
    r"\\(?:q?quad|text|mathrm)\b|for (?:part )?\(?[a-z0-9]\)?|[\s$.()\[\]{}\\]"
)
WIDEST_JOINT = 60  # characters between boxes of one list
MOST_BOXES = 3  # different boxed answers; more is hedging


def final_text(completion: str) -> str:
    """What follows the last thinking marker; nothing while thinking goes on."""
    end = max((match.end() for match in MARKER.finditer(completion)), default=0)
    text = completion[end:]
    return "" if STILL_THINKING.search(text) else text


def answer(completion: str) -> tuple[str | None, str]:
    """The answer, or None, and a reason where there is none."""
    text = final_text(completion)
    boxes = boxed(text)
    if boxes:
        different = {"".join(box.split()) for box in boxes}
        if len(different) > MOST_BOXES:
            return None, f"{len(different)} different boxed answers"
        last = text[text.rindex("}") :][-TAIL:]
        if FINAL.search(last):  # a statement after the box is what is meant
            return said(last)
        return (boxes[-1], "") if boxes[-1].strip() else (None, "the box is empty")
    if BOX.search(text):
        return None, "the box is not closed"
    tail = text[-TAIL:]
    if "####" in tail:
        return tail.rsplit("####", 1)[1].strip().split("\n")[0].strip(), ""
    if SAID.search(tail):
        return said(tail)
    numbers = NUMBER.findall(tail)
    return (numbers[-1].rstrip(","), "") if numbers else (None, "no answer found")


def said(text: str) -> tuple[str | None, str]:
    """What follows the last "answer is"."""
    last = list(SAID.finditer(text))[-1]
    phrase = plain(text[last.end() :].strip().split("\n")[0])
    return (phrase, "") if phrase else (None, "no answer found")


def gold_answer(gold: str) -> str:
    """The answer in a gold text, which may be a whole solution."""
    if BOX.search(gold) or SAID.search(gold) or "####" in gold:
        found = answer(gold)[0]
        return found if found is not None else BOX.split(gold)[-1]
    return gold


def boxed(text: str) -> list[str]:
    """The answers in closed boxes, in order; boxes joined as a list are one answer."""
    found: list[list[str]] = []
    position = 0
    while match := BOX.search(text, position):
        end = closing(text, match.end())
        if end is None:
            break
        content = text[match.end() : end]
        if found and joined(text[position + 1 : match.start()]):
            found[-1].append(content)
        else:
            found.append([content])
        position = end
    return [", ".join(dict.fromkeys(boxes)) for boxes in found]


def joined(between: str) -> bool:
    """Whether the text between two boxes makes them one list."""
    if len(between) > WIDEST_JOINT:
        return False
    return JOINT.sub("", between) in (",", ";", "and", "or", ",and", ",or")


def closing(text: str, start: int) -> int | None:
    """Where the brace opened just before `start` is closed."""
    depth = 1
    for match in BRACE.finditer(text, start):
        if match.group() == "{":
            depth += 1
        elif match.group() == "}":
            depth -= 1
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
