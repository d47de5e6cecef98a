"""Finding the answer in a completion, in time linear in its length.

Only the text after the last thinking marker counts. There the last boxed answer wins,
then GSM8K's "#### x", then "answer is x", then the last number.
"""

import re

MARKERS = ("<conclude>", "**Final Answer**", "</think>")
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
SAID = re.compile(r"answer\s*(?:is|:|=)\s*:?", re.IGNORECASE)
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")
TAIL = 2000  # characters at the end that are searched where nothing is boxed
MOST_BOXES = 2  # different boxed answers; more is hedging


def final_text(completion: str) -> str:
    """What follows the last thinking marker; nothing while thinking goes on."""
    found = ((completion.rfind(marker), len(marker)) for marker in MARKERS)
    end = max((place + size for place, size in found if place >= 0), default=0)
    text = completion[end:]
    return text.split("<think>", 1)[0] if end == 0 else text


def answer(completion: str) -> tuple[str | None, str]:
    """The answer, or None, and a reason where there is none."""
    text = final_text(completion)
    boxes = boxed(text)
    if boxes:
        different = {"".join(box.split()) for box in boxes}
        if len(different) > MOST_BOXES:
            return None, f"{len(different)} different boxed answers"
        return (boxes[-1], "") if boxes[-1].strip() else (None, "the box is empty")
    if BOX.search(text):
        return None, "the box is not closed"
    tail = text[-TAIL:]
    if "####" in tail:
        return tail.rsplit("####", 1)[1].strip().split("\n")[0].strip(), ""
    said = list(SAID.finditer(tail))
    if said:
        phrase = plain(tail[said[-1].end() :].strip().split("\n")[0])
        return (phrase, "") if phrase else (None, "no answer found")
    numbers = NUMBER.findall(tail)
    return (numbers[-1].rstrip(","), "") if numbers else (None, "no answer found")


def boxed(text: str) -> list[str]:
    """The contents of every closed box, in order."""
    found, position = [], 0
    while match := BOX.search(text, position):
        end = closing(text, match.end())
        if end is None:
            break
        found.append(text[match.end() : end])
        position = end
    return found


def closing(text: str, start: int) -> int | None:
    """Where the brace opened just before `start` is closed."""
    depth = 1
    for match in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        if match.group() == "{":
            depth += 1
        elif match.group() == "}":
            depth -= 1
            if depth == 0:
                return start + match.start()
    return None


def plain(phrase: str) -> str:
    """A phrase without the sentence around it: its formula, or up to the full stop."""
    formula = re.match(r"\s*\$([^$]+)\$|\s*\\\((.+?)\\\)", phrase)
    if formula:
        return formula.group(1) or formula.group(2)
    return re.split(r"\.(?:\s|$)|\*\*", phrase.strip().lstrip("*"))[0].strip()
