"""Comparison of two evaluations of the same problems: a real gain, or chance?"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oreal_jax.errors import InputError
from oreal_jax.evaluation.statistics import Paired, paired
from oreal_jax.files import read_rows
from oreal_jax.verify.verdict import read_outcome

Kind = tuple[str, bool]  # (set, greedy)


class Item(NamedTuple):
    """A problem, and whether each of its samples is correct."""

    question: str
    correct: list[bool]


Items = dict[str, Item]  # by id


class Comparison(NamedTuple):
    """Both models on one set, problem by problem.

    `left_out` counts problems that only one of the two files has.
    """

    name: str
    measure: str
    paired: Paired
    left_out: int

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "set": self.name,
            "measure": self.measure,
            **self.paired._asdict(),
            "difference": self.paired.difference._asdict(),
            "left_out": self.left_out,
        }


def compare(first: Path, second: Path, seed: int = 0) -> list[Comparison]:
    """Compare the items of two evaluations, set by set; `seed` is the bootstrap's.

    Raises:
        InputError: a file does not hold items, the two have none in common, or
            different questions under one id.
    """
    old, new = read_items(first), read_items(second)
    common = [kind for kind in old if kind in new]
    if not common:
        name = lambda kind: f"{kind[0]} ({'greedy' if kind[1] else 'sampled'})"
        raise InputError(
            f"{first} and {second} have nothing in common: "
            f"{', '.join(map(name, old))} against {', '.join(map(name, new))}"
        )
    return [compare_kind(k, [(first, old[k]), (second, new[k])], seed) for k in common]


def compare_kind(
    kind: Kind, files: Sequence[tuple[Path, Items]], seed: int
) -> Comparison:
    """Compare the problems of one kind that both files have.

    Raises:
        InputError: no id is common, or they cannot be compared.
    """
    name, greedy = kind
    (path, first), (other_path, second) = files
    common = [id for id in first if id in second]
    if not common:
        raise InputError(f"{path} and {other_path}: no id of set {name!r} in common")
    for id in common:
        if first[id].question != second[id].question:
            raise InputError(
                f"{path} and {other_path}: id {id!r} of set {name!r} has two questions"
            )
    samples, correct = [], []
    for path, items in files:
        sizes = sorted({len(items[id].correct) for id in common})
        if len(sizes) > 1:
            raise InputError(
                f"{path}: problems with {sizes[0]} and with {sizes[-1]} samples"
            )
        samples += sizes
        correct.append(np.array([sum(items[id].correct) for id in common]))
    measures = dict.fromkeys("pass@1" if greedy else f"avg@{k}" for k in samples)
    return Comparison(
        name,
        " against ".join(measures),
        paired(correct[0], correct[1], (samples[0], samples[1]), seed),
        len(first.keys() ^ second.keys()),
    )


def read_items(path: Path) -> dict[Kind, Items]:
    """Read the problems of each kind from `oreal eval --items` or `--json`.

    Raises:
        InputError: naming file, line, field and value.
    """
    kinds: dict[Kind, Items] = {}
    types = {"set": str, "id": str, "greedy": bool, "question": str}
    for where, row in _read_rows(path):
        for field, kind in types.items():
            if not isinstance(row.get(field), kind):
                raise InputError(
                    f"{where}: field {field!r} is {row.get(field)!r}, expected an item "
                    "of `oreal eval`"
                )
        items = kinds.setdefault((row["set"], row["greedy"]), {})
        item = items.setdefault(row["id"], Item(row["question"], []))
        item.correct.append(read_outcome(where, row) == "correct")
    return kinds


def _read_rows(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    if path.suffix != ".json" or not path.is_file():
        return read_rows(path)
    try:
        items = json.loads(path.read_text(encoding="utf-8"))["items"]
        return [(f"{path}: item {i}", dict(item)) for i, item in enumerate(items)]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not a report of `oreal eval --json`") from None
