"""Commands and Python snippets printed in documents, docstrings and `--help`.

In Markdown a fenced block without a language is for the shell: if some of its lines
begin with "$ ", those are its commands and the others their output, else every line is
a command. `text` blocks are not commands, `python` blocks are snippets. Inline code is
a command if it begins with one of `PROGRAMS`, options if it begins with "--". In the
page on troubleshooting, code with "..." is a message, with "..." in place of values.
"""

import argparse
import ast
import inspect
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PROGRAMS = ("oreal", ".venv/bin/oreal", "make", "python", "pip", "sbatch", "curl")
PROGRAMS += ("tools/launch_pod.sh", "tools/slurm.sh")
ENVIRONMENT = re.compile(r"(?:[A-Z_]+=\S+ +)*")  # variables before a program
FENCE = re.compile(r"^ *```(.*)\n((?:.*\n)*?) *```$", re.MULTILINE)
INLINE = re.compile(r"`((?:[^`\n]|\n(?! *\n))+)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
REPOSITORY_PATH = re.compile(
    r"(?:configs|docs|oreal_jax|tests|tools)/[\w/]*(?:\.\w+)?(?:::\w+)?"
)
MESSAGES = "docs/troubleshooting.md"
MODULE = re.compile(r"\w+(?:/\w+)*\.py")


class Printed(NamedTuple):
    """`kind`: "block", "inline", "options", "path", "snippet", "message" or "fence"."""

    file: str
    line: int
    kind: str
    text: str

    def __str__(self):
        return f"{self.file}:{self.line}: {' '.join(self.text.split())[:60]}"


def is_command(text: str) -> bool:
    """Whether a line or inline code begins with one of `PROGRAMS`."""
    words = text[ENVIRONMENT.match(text).end() :].split()  # pyright: ignore
    return bool(words) and words[0] in PROGRAMS


def in_markdown(file: str, text: str) -> Iterator[Printed]:
    """Commands, snippets and paths of a Markdown document."""
    for match in FENCE.finditer(text):
        first = text[: match.start()].count("\n") + 2
        language, body = match[1].strip(), match[2]
        if language == "python":
            yield Printed(file, first, "snippet", body)
        elif not language:
            yield from in_shell_block(file, first, body)
        elif language != "text":
            yield Printed(file, first - 1, "fence", language)
    # Blank out blocks; line numbers do not change.
    prose = FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    for match in re.finditer(r"\n\n {4,}\S", prose):
        line = prose[: match.start()].count("\n") + 3
        yield Printed(file, line, "fence", "indented instead of fenced")
    yield from inline(file, 1, prose)
    for match in LINK.finditer(prose):
        target = (Path(file).parent / match[1]).as_posix()
        yield Printed(file, prose[: match.start()].count("\n") + 1, "path", target)


def in_shell_block(file: str, first: int, body: str) -> Iterator[Printed]:
    """Commands of a shell block, each with its continuation lines."""
    lines = body.splitlines()
    transcript = any(line.startswith("$ ") for line in lines)
    pending, begin = "", first
    for number, line in enumerate(lines, first):
        if not pending:
            if not line.strip() or (transcript and not line.startswith("$ ")):
                continue
            begin, line = number, line.removeprefix("$ ")
        pending += line + "\n"
        if not line.endswith("\\") and is_complete(pending):
            yield Printed(file, begin, "block", pending.strip())
            pending = ""
    if pending:
        yield Printed(file, begin, "block", pending.strip())


def is_complete(command: str) -> bool:
    """Whether bash can parse the command."""
    return not subprocess.run(["bash", "-n", "-c", command], stderr=-3).returncode


def inline(file: str, first: int, prose: str) -> Iterator[Printed]:
    """Inline code that is a command, options, or a path of this repository."""
    for match in INLINE.finditer(prose):
        line = first + prose[: match.start()].count("\n")
        text = re.sub(r"\n *", " ", match[1])
        if file == MESSAGES and "..." in text:
            yield Printed(file, line, "message", text)
        elif text.startswith("--"):
            yield Printed(file, line, "options", text)
        elif REPOSITORY_PATH.fullmatch(text) or MODULE.fullmatch(text):
            yield Printed(file, line, "path", text)
        elif is_command(text) or " --" in text:
            yield Printed(file, line, "inline", text)


def in_docstrings(file: str, source: str) -> Iterator[Printed]:
    """Commands in the docstrings of a Python file.

    They are indented lines, lines that begin with a program, and inline code.
    """
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, kinds) or not ast.get_docstring(node):
            continue
        constant = node.body[0].value  # pyright: ignore
        first, prose = constant.lineno, []
        for number, line in enumerate(inspect.cleandoc(constant.value).splitlines()):
            if line.startswith("    ") or is_command(line):
                yield Printed(file, first + number, "block", line.strip())
                line = ""
            prose.append(line)
        yield from inline(file, first, "\n".join(prose))


def in_script(file: str, source: str) -> Iterator[Printed]:
    """Commands in a shell script's comments, and after "example" in its usage."""
    comments = [
        line[1:] if re.match("#( |$)", line) else "" for line in source.splitlines()
    ]
    for number, line in enumerate(comments, 1):
        if line.startswith("     "):
            yield Printed(file, number, "block", line.strip())
    for match in re.finditer(r"^example\n((?:  .*\n)+)", source, re.MULTILINE):
        first = source[: match.start()].count("\n") + 2
        yield from in_shell_block(file, first, match[1])


def in_help(parser: argparse.ArgumentParser) -> Iterator[Printed]:
    """Examples of every verb, located where the verb is defined."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from in_help(verb)
    epilog = parser.epilog or ""
    call = parser.get_default("call")
    location = ("oreal_jax/cli/command_line.py", 1)
    if call:
        code = inspect.unwrap(call).__code__
        path = Path(code.co_filename).resolve().relative_to(ROOT)
        location = (path.as_posix(), code.co_firstlineno)
    if epilog:
        yield Printed(*location, "block", epilog.partition(": ")[2])


def collect_all(parser: argparse.ArgumentParser) -> list[Printed]:
    """Everything that this repository prints."""
    items: list[Printed] = []

    def read(patterns: Iterable[str], collect) -> None:
        for path in sorted(p for pattern in patterns for p in ROOT.glob(pattern)):
            file = path.relative_to(ROOT).as_posix()
            items.extend(collect(file, path.read_text(encoding="utf-8")))

    read(["*.md", "docs/*.md"], in_markdown)
    read(["configs/*.py", "tools/*.py"], in_docstrings)
    read(["tools/*.sh"], in_script)
    items.extend(in_help(parser))
    return items
