"""Questions with gold answers, read from files and checked row by row."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from oreal_jax.errors import InputError
from oreal_jax.files import is_text, read_rows, text_field

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
