"""Two evaluations of the same problems: is the second better, or is it chance?"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oreal_jax.errors import InputError
from oreal_jax.evaluation.statistics import Paired, paired
from oreal_jax.files import read_rows
from oreal_jax.verify.verdict import read_outcome

Kind = tuple[str, bool]  # (set, greedy)


class Item(NamedTuple):
    """A problem and which of its samples are correct."""

    question: str
    correct: list[bool]


Items = dict[str, Item]  # by id


class Comparison(NamedTuple):
    """The same attempts of both models at one set, problem by problem.

    `left_out` counts problems that only one of the two files has.
    """

    name: str
    measure: str
    paired: Paired
    left_out: int

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "set": self.name,
            "measure": self.measure,
            **self.paired._asdict(),
            "difference": self.paired.difference._asdict(),
            "left_out": self.left_out,
        }


def compare(first: Path, second: Path, seed: int = 0) -> list[Comparison]:
    """Compares the items of two evaluations, set by set; `seed` is the bootstrap's.

    Raises:
        InputError: a file is not of items, the two share none, or the same id has
            different questions.
    """
    one, other = read_items(first), read_items(second)
    shared = [kind for kind in one if kind in other]
    if not shared:
        called = lambda kind: f"{kind[0]} ({'greedy' if kind[1] else 'sampled'})"
        found = lambda kinds: ", ".join(map(called, kinds))
        raise InputError(
            f"{first} and {second} have nothing in common: {found(one)} against "
            f"{found(other)}"
        )
    return [
        compare_kind(kind, (first, second), (one[kind], other[kind]), seed)
        for kind in shared
    ]


def compare_kind(
    kind: Kind, paths: tuple[Path, Path], items: tuple[Items, Items], seed: int
) -> Comparison:
    """Compares the problems that both have of one kind; `paths` are for messages.

    Raises:
        InputError: there is none, or the two cannot be compared.
    """
    name, greedy = kind
    both = f"{paths[0]} and {paths[1]}"
    common = [id for id in items[0] if id in items[1]]
    if not common:
        raise InputError(f"{both}: no id of set {name!r} in common")
    for id in common:
        if items[0][id].question != items[1][id].question:
            raise InputError(f"{both}: id {id!r} of set {name!r} has two questions")
    one, other = (
        samples_of(path, [of[id] for id in common])
        for path, of in zip(paths, items, strict=True)
    )
    correct = lambda of: np.array([sum(of[id].correct) for id in common])
    names = dict.fromkeys("pass@1" if greedy else f"avg@{k}" for k in (one, other))
    return Comparison(
        name,
        " against ".join(names),
        paired(correct(items[0]), correct(items[1]), (one, other), seed),
        len(items[0].keys() ^ items[1].keys()),
    )


def samples_of(path: Path, items: Sequence[Item]) -> int:
    """How many samples each problem has; InputError where they have not as many."""
    sizes = sorted({len(item.correct) for item in items})
    if len(sizes) > 1:
        raise InputError(
            f"{path}: problems with {sizes[0]} and with {sizes[-1]} samples"
        )
    return sizes[0]


def read_items(path: Path) -> dict[Kind, Items]:
    """The problems of each kind, from `oreal eval --items` or `--json`.

    Raises:
        InputError: naming file, line, field and value.
    """
    kinds: dict[Kind, Items] = {}
    for name, row in _rows(path):
        for field, type_ in [
            ("set", str),
            ("id", str),
            ("greedy", bool),
            ("question", str),
        ]:
            if not isinstance(row.get(field), type_):
                raise InputError(
                    f"{name}: field {field!r} is {row.get(field)!r}, expected an item "
                    "of `oreal eval`"
                )
        items = kinds.setdefault((row["set"], row["greedy"]), {})
        item = items.setdefault(row["id"], Item(row["question"], []))
        item.correct.append(read_outcome(name, row) == "correct")
    return kinds


def _rows(path: Path):
    if path.suffix != ".json" or not path.is_file():
        return list(read_rows(path))
    try:
        items = json.loads(path.read_text(encoding="utf-8"))["items"]
        return [(f"{path}: item {i}", dict(item)) for i, item in enumerate(items)]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not a report of `oreal eval --json`") from None
