"""Bytes that a compiled program moves between devices, read from its HLO text.

The text is a list of computations that call each other. A collective counts with the
size of its result on one device, once for each iteration of the loops around it. The
condition of a loop compares a counter with a constant if its length is known; unrolled
loops count in larger steps. An asynchronous collective appears in every fusion that it
overlaps with, always with the same channel; it counts once.
"""

import functools
import math
import re
from collections import Counter

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

_BYTES = {"pred": 1, "s4": 1, "u4": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8}

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", re.MULTILINE)
_CALLS = re.compile(r"(?:body|to_apply|calls|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_RESULT = re.compile(r"= (.*?) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CONSTANT = re.compile(r"%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
_ELEMENT = re.compile(r"= [su]32\[\]\S* get-tuple-element\(.*index=(\d+)")
_NAME = re.compile(r"%?([\w.\-]+)")


def collective_bytes(text: str, repeats: int = 1) -> dict[str, int]:
    """Count bytes by kind of collective.

    A loop of unknown length runs `repeats` times.
    """
    _, *parts = _HEAD.split(text)
    entries, names, bodies = parts[::3], parts[1::3], parts[2::3]
    computations = dict(zip(names, bodies, strict=True))

    @functools.cache
    def total(computation: str) -> Counter:
        counts, channels = Counter(), set()
        for line in computations.get(computation, "").splitlines():
            counts += count(line, channels)
        return counts

    def count(line: str, channels: set[str]) -> Counter:
        result = _RESULT.search(line)
        if not result:
            return Counter()
        operation = result[2].removesuffix("-start")
        if operation in KINDS:
            return Counter({operation: _result_bytes(result[1], result[2])})
        counts = Counter()
        branches = " ".join(_BRANCHES.findall(line))
        for name in _CALLS.findall(line) + _NAME.findall(branches):
            own_channels = set(_CHANNEL.findall(computations.get(name, "")))
            is_repeated = own_channels and own_channels <= channels
            if operation != "fusion" or not is_repeated:
                counts += total(name)
            channels |= own_channels
        if operation == "while" and counts:
            trips = _trip_count(line, computations) or repeats
            counts = Counter({kind: trips * size for kind, size in counts.items()})
        return counts

    return dict(total(names[entries.index("ENTRY ")]))


def _trip_count(line: str, computations: dict[str, str]) -> int | None:
    """Return the iterations of a loop; None if its condition has no constant."""
    names = dict(re.findall(r"(condition|body)=%?([\w.\-]+)", line))
    condition = computations[names["condition"]]
    limit = max((int(n) for _, n in _CONSTANT.findall(condition)), default=None)
    counters = _ELEMENT.findall(condition)
    if limit is None or len(counters) != 1:
        return limit
    return -(-limit // _increment(computations[names["body"]], int(counters[0])))


def _increment(body: str, counter: int) -> int:
    """Return what a loop's body adds to an element of its state; 1 if unknown."""
    lines = body.splitlines()
    root = next(line for line in lines if line.lstrip().startswith("ROOT"))
    _, _, state = re.sub(r"/\*.*?\*/", "", root).partition(" tuple(")
    new_value = _NAME.findall(state.split(")")[0])[counter : counter + 1]
    constants = dict(_CONSTANT.findall(body))
    for line in lines:
        name, _, operation = line.strip().partition(" = ")
        if new_value == [name.removeprefix("%")] and " add(" in operation:
            terms = _NAME.findall(operation.partition(" add(")[2].split(")")[0])
            return next((int(constants[t]) for t in terms if t in constants), 1)
    return 1


def _result_bytes(shape: str, operation: str) -> int:
    """Count the bytes of a result; a started collective also returns its operands."""
    sizes = [
        math.prod(int(size) for size in dimensions.split(",") if size)
        * _BYTES.get(kind, 1 if "8" in kind else 4)  # f8..., s8, u8
        for kind, dimensions in _ARRAY.findall(shape)
    ]
    if operation.endswith("-start") and operation != "all-reduce-start":
        return max(sizes, default=0)
    return sum(sizes)
