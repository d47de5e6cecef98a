"""Questions with gold answers, read from files and checked row by row."""

import dataclasses
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from oreal_jax.errors import InputError

Label = str | int | float | bool | list[str]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question with its gold answer; `pass_rate` of some model on it, if measured.

    `labels` are the other fields of its row that hold text, a number or a list of
    texts: subject, level, skills.
    """

    id: str
    question: str
    gold_answer: str
    pass_rate: float | None = None
    labels: Mapping[str, Label] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def key(self) -> int:
        """A number (32 bits) that names the prompt in random keys."""
        return zlib.crc32(self.id.encode())

    def values(self, field: str) -> list[str]:
        """What a label says, as texts: several where it is a list, none without it."""
        value = self.labels.get(field, [])
        return [str(each) for each in (value if isinstance(value, list) else [value])]

    def as_json(self) -> dict[str, Any]:
        """The row of a file that `read_prompts` reads back as this prompt."""
        own = {
            "id": self.id,
            "question": self.question,
            "gold_answer": self.gold_answer,
        }
        rate = {} if self.pass_rate is None else {"pass_rate": self.pass_rate}
        return own | rate | dict(self.labels)


@dataclasses.dataclass(frozen=True)
class Solved:
    """A question with a full solution, for supervised tuning."""

    question: str
    solution: str


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a jsonl or parquet file with a name for messages, "file:line".

    Raises:
        InputError: no such file, no rows, another kind of file, or a line not JSON.
    """
    if path.is_dir():
        raise InputError(f"{path}: a directory, expected a .jsonl or .parquet file")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a parquet file: {error}") from None
        named = ((f"{path}: row {i}", row) for i, row in enumerate(rows, start=1))
    elif path.suffix in (".jsonl", ".json"):
        named = _json_lines(path)
    else:
        raise InputError(f"{path}: expected .jsonl or .parquet, not {path.suffix!r}")
    empty = True
    for name, row in named:
        empty = False
        yield name, row
    if empty:
        raise InputError(f"{path}: the file has no rows")


def read_text(path: Path) -> str:
    """The text of a file, or InputError naming it."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as text: {error}") from None


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Bytes, so that a line that is not UTF-8 is known by its number.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                # The parser's own message would count lines from this one.
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise InputError(f"{path}:{number}: not JSON: {reason}") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: not a JSON object")
            yield f"{path}:{number}", row


def text_field(name: str, row: dict[str, Any], field: str) -> str:
    """A field that must hold text; a finite number is taken as Python prints it.

    Raises:
        InputError: it holds something else, or half of a surrogate pair, which no
            tokenizer accepts.
    """
    value = row.get(field)
    if isinstance(value, int | float) and not isinstance(value, bool):
        # Python's JSON reader takes NaN and Infinity, which are no answers.
        value = str(value) if abs(value) < math.inf else value
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{name}: field {field!r} is {value!r}, expected text")
    if not is_text(value):
        raise InputError(f"{name}: field {field!r} is {value!r}, not valid Unicode")
    return value


def is_text(value: Any) -> bool:
    """Whether a value is text that can be written: no half of a surrogate pair."""
    surrogate = lambda letter: "\ud800" <= letter <= "\udfff"
    return isinstance(value, str) and not any(map(surrogate, value))


def is_label(value: Any) -> bool:
    """Whether a value of a row is kept as a label."""
    if isinstance(value, list):
        return all(map(is_text, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) or is_text(value)


def read_prompts(
    path: Path,
    question: str = "question",
    gold_answer: str = "gold_answer",
    answer_of: Callable[[Any], Any] = lambda value: value,
) -> list[Prompt]:
    """The prompts of a file of `question, gold_answer, pass_rate, id` rows.

    `question` and `gold_answer` name the fields that hold them, `answer_of` turns
    what that field holds into the answer. A row without an id is named after its place
    in the file.

    Raises:
        InputError: naming file, line, field and value.
    """
    prompts, seen = [], {}
    own = {"id", "pass_rate", question, gold_answer, "question", "gold_answer"}
    for place, (name, row) in enumerate(read_rows(path)):
        rate = row.get("pass_rate")
        number = isinstance(rate, int | float) and not isinstance(rate, bool)
        if rate is not None and not (number and 0 <= rate <= 1):
            raise InputError(f"{name}: field 'pass_rate' is {rate!r}, expected 0 to 1")
        id = str(place) if row.get("id") is None else text_field(name, row, "id")
        if id in seen:
            raise InputError(f"{name}: field 'id' is {id!r}, as in {seen[id]}")
        seen[id] = name
        answer = {gold_answer: answer_of(row.get(gold_answer))}
        labels = {k: v for k, v in row.items() if k not in own and is_label(v)}
        prompts.append(
            Prompt(
                id,
                text_field(name, row, question),
                text_field(name, answer, gold_answer),
                None if rate is None else float(rate),
                labels,
            )
        )
    return prompts


def read_examples(path: Path) -> list[Solved]:
    """The rows `question, solution` of a file."""
    return [
        Solved(text_field(name, row, "question"), text_field(name, row, "solution"))
        for name, row in read_rows(path)
    ]


def read_questions(path: Path) -> list[str]:
    """The `question` of every row of a file."""
    return [text_field(name, row, "question") for name, row in read_rows(path)]


class Prediction(NamedTuple):
    """An answer to judge, which may be empty; the question where it is known."""

    prediction: str
    gold: str
    question: str | None


def read_judgements(path: Path) -> list[Prediction]:
    """The rows `prediction, gold`, perhaps `question`, of a file."""
    return [
        Prediction(
            "" if row.get("prediction") == "" else text_field(name, row, "prediction"),
            text_field(name, row, "gold"),
            None if row.get("question") is None else text_field(name, row, "question"),
        )
        for name, row in read_rows(path)
    ]
