"""Accuracy and speed of the verifier, on real problems and on costly formulas.

    python tools/bench_verify.py math500.jsonl --solutions gsm8k_test.jsonl

Every file has `gold_answer` rows. Each gold answer is rewritten in every way of `WAYS`
that changes it, and verified against itself; then answers per second are measured over
completions with a solution, and over a batch with one costly formula in twenty.
"""

import argparse
import collections
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from oreal_jax.verify import Pool, Verdict

FRACTION = re.compile(r"\\frac\{(-?\d+)\}\{(\d+)\}")
SYMBOLS = {
    r"\pi": "π",
    r"\infty": "∞",
    r"\leq": "≤",
    r"\geq": "≥",
    r"\cup": "∪",
    r"^\circ": "°",
    r"^{\circ}": "°",
    r"\cdot": "·",
    r"\times": "×",
    r"\pm": "±",
    "-": "−",
}


def boxed(text: str) -> str:
    """Write a sentence that ends with the box."""
    return f"Adding both sides, we find that the answer is $\\boxed{{{text}}}$."


def unicode(text: str) -> str:
    """Replace commands by Unicode signs."""
    for command, sign in SYMBOLS.items():
        text = re.sub(re.escape(command) + r"(?![a-zA-Z])", sign, text)
    return re.sub(r"\\sqrt\{(\w+)\}", r"√(\1)", text)


def decimal(text: str) -> str:
    """Write 0.5 for 1/2, if the answer is a fraction and the decimal is finite."""
    match = re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", text)
    if not match or not int(match[3]) or 10**6 % int(match[3]):
        return text
    return match[1] + format(int(match[2]) / int(match[3]), ".10g")


def fraction(text: str) -> str:
    """Write 1/2 for 0.5."""
    if not re.fullmatch(r"-?\d*\.\d+", text):
        return text
    value = Fraction(text)
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def thousands(text: str, comma: str) -> str:
    """Write commas in a large whole number."""
    if not re.fullmatch(r"-?\d{4,}", text):
        return text
    return f"{int(text):,}".replace(",", comma)


def with_spaces(text: str) -> str:
    """Put spaces around signs."""
    return re.sub(r"(?<=[\w})])\s*([-+=,])\s*(?=[\w\\({])", r" \1 ", text)


def without_spaces(text: str) -> str:
    """Remove all spaces but those that end a command."""
    if r"\text" in text or r"\mbox" in text:
        return text
    return re.sub(r"(\\[a-zA-Z]+ )(?=[a-zA-Z])|\s+", r"\1", text).replace("\\ ", "")


def with_fewer_braces(text: str) -> str:
    r"""Write x^2 for x^{2}, \sqrt2 for \sqrt{2}, \frac12 for \frac{1}{2}."""
    text = re.sub(r"([\^_])\{(\w)\}(?!\d)", r"\1\2", text)
    text = re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", text)
    return re.sub(r"\\frac\{(\d)\}\{(\d)\}(?!\d)", r"\\frac\1\2", text)


def with_more_braces(text: str) -> str:
    """Invert `with_fewer_braces`."""
    text = re.sub(r"([\^_])(\w)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", text)
    return re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)


def with_slash(text: str) -> str:
    """Write a/b for an answer that is a fraction of whole numbers."""
    match = re.fullmatch(r"(-?)\\frac\{(-?\d+)\}\{(\d+)\}", text)
    return f"{match[1]}{match[2]}/{match[3]}" if match else text


def in_bold(text: str) -> str:
    """Set words in bold."""
    return re.sub(r"\\(?:text|mbox)\{([^{}]*)\}", r"\\textbf{\1}", text)


def reversed_list(text: str) -> str:
    """Reverse the order of a list."""
    parts = re.split(r",\s*", text)
    return ",".join(reversed(parts)) if not re.search(r"[()\[\]{}\\]", text) else text


def hanging(completion: str, prompt: Mapping[str, Any]) -> Verdict:
    """Refuse every completion, and hang on those that begin with "hang"."""
    time.sleep(60 if completion.startswith("hang") else 0)
    return Verdict("incorrect", "")


WAYS: dict[str, Callable[[str], str]] = {
    "boxed in a sentence": boxed,
    "in a display": lambda g: f"Hence\n\\[\n\\boxed{{{g}}}\n\\]",
    "after a heading": lambda g: f"**Final Answer**\n\n$\\boxed{{{g}}}$",
    "after thinking": lambda g: f"<think>Maybe \\boxed{{0}}?</think>\n$\\boxed{{{g}}}$",
    "spaces in the box": lambda g: f"$\\boxed{{ {g} }}$",
    "dollars in the box": lambda g: f"\\boxed{{${g}$}}",
    "a period in the box": lambda g: f"\\boxed{{{g}.}}",
    "without a box": lambda g: f"So the answer is ${g}$.",
    r"\dfrac": lambda g: boxed(g.replace(r"\frac", r"\dfrac")),
    r"\tfrac": lambda g: boxed(g.replace(r"\frac", r"\tfrac")),
    r"\displaystyle": lambda g: boxed(r"\displaystyle " + g),
    r"\left and \right": lambda g: boxed(
        re.sub(r"(?<!\\left)\(", r"\\left(", re.sub(r"(?<!\\right)\)", r"\\right)", g))
    ),
    r"no \left and \right": lambda g: boxed(re.sub(r"\\(left|right)\b", "", g)),
    "spaces": lambda g: boxed(with_spaces(g)),
    "no spaces": lambda g: boxed(without_spaces(g)),
    "fewer braces": lambda g: boxed(with_fewer_braces(g)),
    "more braces": lambda g: boxed(with_more_braces(g)),
    "all in braces": lambda g: boxed("{" + g + "}"),
    "unicode": lambda g: boxed(unicode(g)),
    "a decimal": lambda g: boxed(decimal(g)),
    "a fraction": lambda g: boxed(fraction(g)),
    "a slash": lambda g: boxed(with_slash(g)),
    "1,000": lambda g: boxed(thousands(g, ",")),
    "1{,}000": lambda g: boxed(thousands(g, "{,}")),
    r"1,\!000": lambda g: boxed(thousands(g, r",\!")),
    r"\% as %": lambda g: boxed(g.replace(r"\%", "%")),
    r"\textbf": lambda g: boxed(in_bold(g)),
    "words bare": lambda g: boxed(re.sub(r"^\\text\{(\w+)\}$", r"\1", g)),
    "all as text": lambda g: boxed(re.sub(r"^([A-Za-z]{2,}|\d+)$", r"\\text{\1}", g)),
    "named": lambda g: boxed(
        re.sub(r"^(-?[\d.]+|-?\\frac\{\d+\}\{\d+\})$", r"x = \1", g)
    ),
    "another order": lambda g: boxed(reversed_list(g)),
    r"\times for \cdot": lambda g: boxed(g.replace(r"\cdot", r"\times")),
    r"\leq as \le": lambda g: boxed(
        re.sub(r"\\(leq|geq|neq)\b", lambda m: m[0][:-1], g)
    ),
    r"\circ braced": lambda g: boxed(g.replace(r"^\circ", r"^{\circ}")),
    "no degree sign": lambda g: boxed(re.sub(r"^(\d+)\^\{?\\circ\}?$", r"\1", g)),
    "thin spaces": lambda g: boxed(re.sub(r",\s*", r",\\,", g)),
}


def rewritten(golds: Iterable[str]) -> list[tuple[str, str, str]]:
    """Return (way, completion, gold) for each way that changes the gold answer."""
    cases = []
    for gold in golds:
        bare = gold.strip().strip("$")
        seen = set()
        for way, write in WAYS.items():
            completion = write(bare)
            if completion not in seen:
                cases.append((way, completion, gold))
            seen.add(completion)
    return cases


COSTLY = (
    "9^{9^{9^{9}}}",
    "9**9**9**9",
    "(10^9)!",
    "((100!)!)!",
    "(" * 400 + "1" + ")" * 400,
    r"\sqrt{" * 300 + "2" + "}" * 300,
    "(x+y+z+w)^{4000}",
    "{" * 2000 + "7" + "}" * 2000,
    "7" * 1_000_000,
    r"\int_0^1 x^{x^{x^{x}}} dx",
    r"\sum_{k=1}^{10^{9}} k^{k}",
    r"\prod_{k=1}^{99999} (x-k)",
)


def with_solutions(files: list[Path], solutions: Path) -> list[tuple[str, str]]:
    """Return completions with the text of a real solution, half of them incorrect."""
    solved = read(solutions)
    pairs = []
    for n, row in enumerate(solved):
        gold = row["gold_answer"] if n % 2 else solved[n - 1]["gold_answer"]
        pairs.append((f"{row['solution']}\n#### {row['gold_answer']}", gold))
    for file in files:
        golds = [row["gold_answer"] for row in read(file)]
        for n, (_, completion, gold) in enumerate(rewritten(golds)):
            if n % 7 == 0:
                working = solved[n % len(solved)]["solution"]
                other = golds[n % len(golds)] if n % 2 else gold
                pairs.append((f"{working}\n{completion}", other))
    return pairs


def read(file: Path) -> list[dict]:
    """Read the rows of a JSON lines file."""
    return [json.loads(line) for line in file.open(encoding="utf-8")]


def measure_rewritten(pool: Pool, file: Path, show: bool) -> None:
    """Print the share of rewritten gold answers that are correct."""
    cases = rewritten(row["gold_answer"] for row in read(file))
    verdicts = pool.verdicts([(completion, gold) for _, completion, gold in cases])
    pairs = zip(cases, verdicts, strict=True)
    missed = [(case, v) for case, v in pairs if v.outcome != "correct"]
    ways = collections.Counter(case[0] for case, _ in missed)
    share = 1 - len(missed) / len(cases)
    print(f"{file.stem}: {share:.2%} of {len(cases)} correct; missed {dict(ways)}")
    for (way, completion, gold), verdict in missed if show else ():
        print(f"   [{way}] {gold!r}: {completion!r}: {verdict.reason}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("files", type=Path, nargs="+")
    options.add_argument(
        "--solutions", type=Path, help="rows with `solution`, for answers per second"
    )
    options.add_argument("--show", action="store_true", help="print missed answers")
    options.add_argument(
        "--smoke", action="store_true", help="quick check with few hanging answers"
    )
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = parser().parse_args(arguments)
    for file in options.files:
        with Pool(2) as pool:
            measure_rewritten(pool, file, options.show)
    if not options.solutions:
        return
    pairs = with_solutions(options.files, options.solutions)
    seconds = measure_seconds(pairs, deadline=5.0)
    print(f"{len(pairs)} completions in {seconds:.1f} s: {len(pairs) / seconds:.0f}/s")
    costly = [(boxed(COSTLY[n % len(COSTLY)]), str(n)) for n in range(len(pairs) // 20)]
    seconds = measure_seconds(pairs + costly, deadline=1.0)
    print(
        f"with {len(costly)} costly formulas: {seconds:.1f} s; deadline 1 s, 2 workers"
    )
    from bench_verify import hanging  # by the name under which workers find it

    hangs = [(f"hang {n}", "") for n in range(2 if options.smoke else 20)]
    seconds = measure_seconds(hangs, deadline=1.0, verifiers=(hanging,))
    print(f"{len(hangs)} answers that hang: {seconds:.1f} s; deadline 1 s, 2 workers")


def measure_seconds(pairs: list[tuple[str, str]], **options) -> float:
    """Return the seconds that a pool of two, once ready, takes for new pairs."""
    with Pool(2, **options) as pool:
        pool.verdicts([("1", "1"), ("2", "2")])
        start = time.perf_counter()
        pool.verdicts(pairs)
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
