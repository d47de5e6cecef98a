"""Questions with gold answers or solutions, read from files and checked row by row."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from oreal_jax.errors import InputError
from oreal_jax.files import is_text, read_rows, text_field

Label = str | int | float | bool | list[str]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question with its gold answer and, where measured, a model's pass rate.

    `labels` are the row's other fields that contain text, a number or a list of texts:
    subject, level, skills.
    """

    id: str
    question: str
    gold_answer: str
    pass_rate: float | None = None
    labels: Mapping[str, Label] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def key(self) -> int:
        """The prompt's number (32 bits) in random keys."""
        return zlib.crc32(self.id.encode())

    def values(self, field: str) -> list[str]:
        """Return a label's values as text: several for a list, none if missing."""
        value = self.labels.get(field, [])
        return [str(each) for each in (value if isinstance(value, list) else [value])]

    def as_json(self) -> dict[str, Any]:
        """Return the row from which `read_prompts` reads this prompt."""
        row = {
            "id": self.id,
            "question": self.question,
            "gold_answer": self.gold_answer,
        }
        rate = {} if self.pass_rate is None else {"pass_rate": self.pass_rate}
        return row | rate | dict(self.labels)


@dataclasses.dataclass(frozen=True)
class SolvedQuestion:
    """A question with a full solution, for supervised fine-tuning."""

    question: str
    solution: str


class Prediction(NamedTuple):
    """An answer to verify, which may be empty; the question if it is known.

    `prompt` has the other fields of its row, for verifiers that read them.
    """

    prediction: str
    gold: str
    question: str | None
    prompt: Mapping[str, Any]


def read_prompts(path: Path, *fields: Any) -> list[Prompt]:
    """Read the prompts of a file; `fields` are those of `make_prompts`.

    Raises:
        InputError: names file, line, field and value.
    """
    return make_prompts(_read_rows(path), *fields)


def make_prompts(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    question: str = "question",
    gold_answer: str = "gold_answer",
    extract_answer: Callable[[Any], Any] = lambda value: value,
) -> list[Prompt]:
    """Return the prompts of named rows `question, gold_answer, pass_rate, id`.

    `question` and `gold_answer` name the fields, `extract_answer` turns the value of
    the latter into the answer. Rows without an id are numbered from 0.

    Raises:
        InputError: names row, field and value.
    """
    rows = list(rows)
    names: dict[str, str] = {}  # of the rows that have an id
    for name, row in rows:
        if row.get("id") is not None:
            id = text_field(name, row, "id")
            if names.setdefault(id, name) != name:
                raise InputError(f"{name}: field 'id' is {id!r}, as in {names[id]}")
    prompts = []
    known = {"id", "pass_rate", question, gold_answer, "question", "gold_answer"}
    for index, (name, row) in enumerate(rows):
        rate = row.get("pass_rate")
        is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
        if rate is not None and not (is_number and 0 <= rate <= 1):
            raise InputError(f"{name}: field 'pass_rate' is {rate!r}, expected 0 to 1")
        id = str(index)
        if row.get("id") is not None:
            id = text_field(name, row, "id")
        else:
            while id in names:
                id = f"_{id}"
        answer = {k: extract_answer(v) for k, v in row.items() if k == gold_answer}
        prompts.append(
            Prompt(
                id,
                text_field(name, row, question),
                text_field(name, {**row, **answer}, gold_answer),
                None if rate is None else float(rate),
                {k: v for k, v in row.items() if k not in known and _is_label(v)},
            )
        )
    return prompts


def _read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows; those of verl and chats with `question` and an answer or solution.

    verl has messages in `prompt` and the answer in `reward_model.ground_truth`; chats
    have one question and its solution in `messages`. System messages are left out: a
    model's chat template or a config's `system_prompt` sets them.
    """
    fields: dict[Any, str] = {"user": "question", "assistant": "solution"}
    for name, row in read_rows(path):
        messages = row.get("prompt", row.get("messages"))
        if "question" not in row and isinstance(messages, list):
            turns = [
                (m.get("role"), m.get("content"))
                for m in messages
                if isinstance(m, dict) and m.get("role") != "system"
            ]
            # Others are left as they are: a message then names their fields.
            if [role for role, _ in turns] in (["user"], ["user", "assistant"]):
                row = {fields[role]: text for role, text in turns} | row
        if isinstance(reward := row.get("reward_model"), dict):
            row = {"gold_answer": reward.get("ground_truth")} | row
        yield name, row


def _is_label(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(is_text, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) or is_text(value)


def read_examples(path: Path) -> list[SolvedQuestion]:
    """Read the rows `question, solution` of a file, or its chats."""
    return [
        SolvedQuestion(
            text_field(name, row, "question"), text_field(name, row, "solution")
        )
        for name, row in _read_rows(path)
    ]


def read_questions(path: Path) -> list[str]:
    """Read the `question` of every row of a file."""
    return [text_field(name, row, "question") for name, row in _read_rows(path)]


def read_judgements(path: Path) -> list[Prediction]:
    """Read the rows `prediction, gold` and optionally `question` of a file."""
    return [
        Prediction(
            "" if row.get("prediction") == "" else text_field(name, row, "prediction"),
            text_field(name, row, "gold"),
            None if row.get("question") is None else text_field(name, row, "question"),
            {
                field: value
                for field, value in row.items()
                if field not in ("prediction", "gold") and _is_label(value)
            },
        )
        for name, row in read_rows(path)
    ]
