"""One spelling for formulas that are only written differently; computes nothing."""

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
    "。": ".", "、": ",",
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
NO_BACKSLASH = {"", " ", "<", ">", "|", ":"}
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
# Functions and constants without backslash; words in \text{} are none.
PLAIN = re.compile(
    r"\\text\{\s*[iI]nfinity\s*\}|(?P<text>\\text\{[^{}]*\})|(?<![\\a-zA-Z_])(?:"
    r"(?P<log>log)_?(?P<base>\d+)(?=\s*\()|(?P<infinity>infinity|inf|oo)"
    r"|(?P<name>pi|sqrt|cbrt|theta|(?:sin|cos|tan|cot|a(?:rc)?(?:sin|cos|tan)|sinh|cosh"
    r"|tanh|exp|ln|log)(?=\s*[({^_\d\\]|\s+[a-zA-Z](?![a-zA-Z]))|(?:sec|csc)(?=\())"
    r")(?![a-zA-Z])"
)
PARENTHESIS = re.compile(r"[()]")
ROOT_OF = re.compile(r"(\\sqrt(?:\[\d+\])?)\s*\(")
OPERAND = r"[\w(\\{]"
WRAPS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))


def normalised(text: str) -> str:
    r"""Return LaTeX in one spelling; words stay in \text{}."""
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
    text = FONT.sub(font, text)
    text = plain_text(text)
    for _ in range(3):  # fractions of fractions
        text = FRACTION.sub(fraction, text)
    text = re.sub(r"\\sqrt\s*(\d|[a-zA-Z](?![a-zA-Z]))", r"\\sqrt{\1}", text)
    text = re.sub(r"([\^_])\s*\{\s*(\w)\s*\}(?!\w)", r"\1\2", text)
    return unwrapped(re.sub(r"\s+", " ", text))


def plain_text(text: str) -> str:
    """Replace what is written as in a programming language by LaTeX."""
    text = re.sub(rf"(?<=[\w)}}])\s*\*\*\s*(?={OPERAND}|-)", "^", text)
    text = re.sub(rf"(?<=[\w)}}!])\s*\*\s*(?={OPERAND})", r"\\cdot ", text)
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text).replace("+/-", r"\pm ")
    text = re.sub(r"(?<![\\a-zA-Z])abs\(([^()]*)\)", r"|\1|", text)
    text = PLAIN.sub(plain_name, text)
    while match := ROOT_OF.search(text):
        end = closing(text, match.end(), PARENTHESIS)
        if end is None:
            break
        inner = text[match.end() : end]
        text = f"{text[: match.start()]}{match[1]}{{{inner}}}{text[end + 1 :]}"
    return text


def plain_name(match: re.Match) -> str:
    """Return the command of a function or constant."""
    if match["text"]:
        return match[0]
    if match["log"]:
        return rf"\log_{{{match['base']}}}"
    if not match["name"]:
        return r"\infty "
    name = match["name"]
    if name == "cbrt":
        return r"\sqrt[3]"
    return "\\" + re.sub(r"^a(?=[sct])", "arc", name) + " "


def ascii_signs(text: str) -> str:
    """Replace Unicode characters by commands and plain letters."""
    if text.isascii():
        return text
    plain = lambda match: "{" + unicodedata.normalize("NFKC", match[0]) + "}"
    text = RAISED.sub(lambda match: "^" + plain(match), text)
    text = LOWERED.sub(lambda match: "_" + plain(match), text).replace("\u2212", "-")
    text = ROOT.sub(lambda m: ROOTS[m[1]] + "{" + m[2].strip("{}") + "}", text)
    return "".join(map(ascii_sign, text))


def ascii_sign(sign: str) -> str:
    """Return the spelling of one character."""
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
    if plain == sign:
        return sign
    if "⁄" in plain:
        top, bottom = plain.split("⁄", 1)
        return f"\\frac{{{top}}}{{{bottom}}}" if bottom else plain
    return "".join(map(ascii_sign, plain))


def command(match: re.Match) -> str:
    """Return one name for a command."""
    if match[1] not in COMMANDS:
        return match[0]
    name = COMMANDS[match[1]]
    if name in NO_BACKSLASH:
        return name
    if name == "^circ":
        return r"^\circ "
    return "\\" + name + ("" if name in "{}" or name == "frac" else " ")


def font(match: re.Match) -> str:
    """Use one font for words, none for letters and numbers."""
    content = match[1]
    if len(content.strip()) == 1 and "text" not in match[0] and "box" not in match[0]:
        return content
    if not re.search("[a-zA-Z]", content):
        return " " + content + " "
    return "\\text{" + content.strip() + "}"


def fraction(match: re.Match) -> str:
    """Return a fraction with all its braces."""
    top = match[1] if match[1] is not None else match[2]
    bottom = match[3] if match[3] is not None else match[4]
    return f"\\frac{{{top.strip()}}}{{{bottom.strip()}}}"


def unwrapped(text: str) -> str:
    """Remove the signs that enclose a formula and what ends a sentence."""
    previous = None
    while text != previous:
        previous = text = text.strip()
        text = re.sub(r"(?:\\\\)+$", "", text)  # line ends
        if not text.endswith("\\"):
            text = text.rstrip(" .,;:\n")
        for before, after in WRAPS:
            inner = text[len(before) : -len(after)]
            enclosed = text.startswith(before) and text.endswith(after)
            if enclosed and len(text) >= len(before + after) and before not in inner:
                text = inner
        if text.startswith("{") and closing(text, 1) == len(text) - 1:
            text = text[1:-1]
    return text.replace("$", " ").strip()


def flat(text: str) -> str:
    """Return text whose words have no font."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    return re.sub(r"\s+", " ", text).strip()
