"""Comparison of two evaluations of the same problems: a real gain, or chance?"""

import json
from collections.abc import Iterable, Mapping, Sequence
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
Settings = Mapping[str, Any]

# Settings that two evaluations may differ in: the model and its stored form, and seeds.
MAY_DIFFER = {"model", "model of", "step", "weights", "cache", "questions", "seed", "k"}
MAY_DIFFER |= {"stop_strings", "stop_words"}  # the model's own
SAMPLED = {"temperature", "top_p", "top_k", "min_p"}  # greedy decoding has none


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


def compare(
    first: Path, second: Path, seed: int = 0, ignore_settings: bool = False
) -> list[Comparison]:
    """Compare the items of two evaluations, set by set; `seed` is the bootstrap's.

    Raises:
        InputError: a file does not hold items, the two have none in common, different
            questions under one id, or, unless `ignore_settings`, different settings.
    """
    old, new = read_items(first), read_items(second)
    common = [kind for kind in old if kind in new]
    if not common:
        name = lambda kind: f"{kind[0]} ({'greedy' if kind[1] else 'sampled'})"
        raise InputError(
            f"{first} and {second} have nothing in common: "
            f"{', '.join(map(name, old))} against {', '.join(map(name, new))}"
        )
    if not ignore_settings:
        check_settings(first, second, common)
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


def check_settings(first: Path, second: Path, kinds: Iterable[Kind]) -> None:
    """Check that items of the same kinds were generated with the same settings.

    Items of older versions have no settings and are not checked.

    Raises:
        InputError: names the first setting that differs.
    """
    old, new = read_settings(first), read_settings(second)
    for kind in kinds:
        ignored = MAY_DIFFER | SAMPLED if kind[1] else MAY_DIFFER
        name = _difference(old.get(kind, {}), new.get(kind, {}), ignored)
        if name:
            raise InputError(
                f"{first} and {second}: set {kind[0]!r} was evaluated with {name}="
                f"{old[kind][name]!r} and {new[kind][name]!r}; evaluate again with "
                "equal settings, or add --ignore-settings"
            )


def check_items_overwritable(path: Path, settings: Settings) -> None:
    """Check that a file holds items of the same settings, if it exists.

    Raises:
        InputError: it holds others, or something else.
    """
    if not path.exists():
        return
    _, row = next(iter(_read_rows(path)), ("", {}))
    old, new = row.get("settings", {}), json.loads(json.dumps(settings))
    if old == new:
        return
    what = "no items with these settings"
    if old and (name := _difference(old, new, set())):
        what = f"items with {name}={old[name]!r}, not {new[name]!r}"
    raise InputError(f"--items {path}: has {what}; remove it, or name another file")


def _difference(old: Settings, new: Settings, ignored: set[str]) -> str | None:
    """Return the first setting that both have with different values."""
    names = [name for name in old if name in new and name not in ignored]
    return next((name for name in names if old[name] != new[name]), None)


def read_settings(path: Path) -> dict[Kind, Settings]:
    """Return the settings of the items of each kind, where they are recorded."""
    return {
        (row["set"], row["greedy"]): row["settings"]
        for _, row in _read_rows(path)
        if isinstance(row.get("settings"), dict)
    }


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
