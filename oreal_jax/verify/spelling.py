"""One spelling for what is only written differently; nothing is computed here."""

import re
import unicodedata

from oreal_jax.verify.extract import closing

SIGNS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ",
    "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "⁄": "/", "∕": "/", "≤": r"\le ",
    "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "∞": r"\infty ",
    "°": r"^\circ ", "º": r"^\circ ", "˚": r"^\circ ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "±": r"\pm ", "∓": r"\mp ", "≈": r"\approx ", "≡": r"\equiv ", "∖": r"\setminus ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}", "∠": r"\angle ", "△": r"\triangle ", "∣": r"\mid ",
    "′": "'", "’": "'", "…": r"\ldots ", "∧": r"\wedge ", "∨": r"\vee ",
    "→": r"\to ", "⟨": r"\langle ", "⟩": r"\rangle ", "∑": r"\sum ", "∫": r"\int ",
}  # fmt: skip
COMMANDS = {
    "leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge", "neq": "ne",
    "lt": "<", "gt": ">", "dfrac": "frac", "tfrac": "frac", "cfrac": "frac",
    "left": "", "right": "", "big": "", "Big": "", "bigl": "", "bigr": "",
    "Bigl": "", "Bigr": "", "displaystyle": "", "textstyle": "", "limits": "",
    "quad": " ", "qquad": " ", "enspace": " ", "thinspace": " ", "degree": "^circ",
    "lbrace": "{", "rbrace": "}", "vert": "|", "lvert": "|", "rvert": "|",
    "varnothing": "emptyset", "R": "mathbb{R}", "reals": "mathbb{R}",
    "infin": "infty", "dots": "ldots", "cdots": "ldots", "colon": ":", "land": "wedge",
    "lor": "vee",
}  # fmt: skip
MONEY = {"\\$": "dollars", "€": "euros", "£": "pounds", "¥": "yen", "₹": "rupees"}
PRICE = re.compile(r"^\s*\$?\s*(\\\$|[€£¥₹])\s*([\d,]*\.?\d+)[\s.]*\$?\s*$")
BARE = {"", " ", "<", ">", "|", ":"}  # what needs no backslash
COMMAND = re.compile(r"\\([a-zA-Z]+)\s*")
FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt|up)?|mathrm|mathbf|mathit|mathsf|mathtt|bf|rm"
    r"|boldsymbol|bm|operatorname\*?|mbox|hbox|underline)\s*\{([^{}]*)\}"
)
DIGIT = r"(\d|\\pi|[a-zA-Z])"
FRACTION = re.compile(
    r"\\frac\s*(?:\{([^{}]*)\}|" + DIGIT + r")\s*(?:\{([^{}]*)\}|" + DIGIT + ")"
)
ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
ROOT = re.compile(r"([√∛∜])\s*(\d+(?:\.\d+)?|\([^()]*\)|\{[^{}]*\}|[a-zA-Z])")
RAISED = re.compile(r"[⁰¹²³⁴-⁹⁺⁻ⁿⁱ]+")
LOWERED = re.compile(r"[₀-₉₊₋]+")
WRAPS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))
AFTER = " .,;:\n"


def normalised(text: str) -> str:
    r"""LaTeX in one spelling; words stay in \text{}."""
    text = ascii_signs(text)
    if "begin{" not in text:  # where a matrix ends its rows with two
        text = re.sub(r"\\\\(?=[a-zA-Z({\[)}\]])", lambda m: "\\", text)
    text = PRICE.sub(lambda m: m[2] + "\\text{" + MONEY[m[1]] + "}", text)
    text = text.replace("\\$", "").replace("\\%", "%").replace("\\#", "#")
    text = re.sub(r"(?<![a-zA-Z])\{([,:])\}|(,)\\!\s*", lambda m: m[1] or m[2], text)
    text = re.sub(r"(?<!\\)\\!", "", text)
    text = re.sub(r"(?<!\\)\\[,;:> ]|~", " ", text)
    text = COMMAND.sub(command, text)
    text = re.sub(r"(?<!\\)<\s*=", r"\\le ", text)
    text = re.sub(r">\s*=", r"\\ge ", text).replace("!=", r"\ne ")
    text = re.sub(r"\^\{\s*\\circ\s*\}|\^\s*\\circ", r"^\\circ", text)
    text = re.sub(r"\^\\circ\s*", r"^\\circ ", text)
    text = FONT.sub(words, text)
    for _ in range(3):  # a fraction of fractions
        text = FRACTION.sub(fraction, text)
    text = re.sub(r"\\sqrt\s*(\d|[a-zA-Z](?![a-zA-Z]))", r"\\sqrt{\1}", text)
    text = re.sub(r"([\^_])\s*\{\s*(\w)\s*\}(?!\w)", r"\1\2", text)
    return unwrapped(re.sub(r"\s+", " ", text))


def ascii_signs(text: str) -> str:
    """Commands and plain letters instead of signs."""
    if text.isascii():
        return text
    raised = lambda m: "^{" + unicodedata.normalize("NFKC", m[0]) + "}"
    lowered = lambda m: "_{" + unicodedata.normalize("NFKC", m[0]) + "}"
    text = LOWERED.sub(lowered, RAISED.sub(raised, text)).replace("\u2212", "-")
    root = lambda m: ROOTS[m[1]] + "{" + m[2].strip("{}") + "}"
    text = ROOT.sub(root, text)
    return "".join(map(ascii_sign, text))


def ascii_sign(sign: str) -> str:
    """One character."""
    if sign.isascii():
        return sign
    if sign in SIGNS:
        return SIGNS[sign]
    name = unicodedata.name(sign, "")
    if name.startswith("GREEK") and " LETTER " in name and name.count(" ") == 3:
        letter = name.split()[-1].lower().replace("lamda", "lambda")
        return "\\" + (letter.title() if "CAPITAL" in name else letter) + " "
    if unicodedata.category(sign) in ("Cf", "Mn"):
        return ""
    plain = unicodedata.normalize("NFKC", sign)
    if "⁄" in plain and plain != sign:
        top, bottom = plain.split("⁄", 1)
        return f"\\frac{{{top}}}{{{bottom}}}" if bottom else plain
    return plain if plain == sign else "".join(map(ascii_sign, plain))


def command(match: re.Match) -> str:
    """One name for each command."""
    name = match[1]
    if name not in COMMANDS:
        return match[0]
    new = COMMANDS[name]
    if new in BARE:
        return new
    if new == "^circ":
        return r"^\circ "
    return "\\" + new + ("" if new in "{}" or new == "frac" else " ")


def words(match: re.Match) -> str:
    """One font for words; letters and numbers need none."""
    inside = match[1]
    if len(inside.strip()) == 1 and "text" not in match[0] and "box" not in match[0]:
        return inside
    if not re.search("[a-zA-Z]", inside):
        return " " + inside + " "
    return "\\text{" + inside.strip() + "}"


def fraction(match: re.Match) -> str:
    """All braces of a fraction."""
    top = match[1] if match[1] is not None else match[2]
    bottom = match[3] if match[3] is not None else match[4]
    return f"\\frac{{{top.strip()}}}{{{bottom.strip()}}}"


def unwrapped(text: str) -> str:
    """Without the signs around a formula and the ones after it."""
    previous = None
    while text != previous:
        previous = text = text.strip()
        if not text.endswith("\\"):
            text = text.rstrip(AFTER)
        for before, after in WRAPS:
            inner = text[len(before) : -len(after)]
            both = text.startswith(before) and text.endswith(after)
            if both and len(text) >= len(before + after) and before not in inner:
                text = inner
        if text.startswith("{") and closing(text, 1) == len(text) - 1:
            text = text[1:-1]
    return text.replace("$", " ").strip() if "$" in text else text


def flat(text: str) -> str:
    """Words as they are read, without their font."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    return re.sub(r"\s+", " ", text).strip()
