"""Bytes that a compiled program moves between devices, read from its text.

The compiler writes a program as computations that call each other; a loop names its
body, and its condition compares a counter with a constant where it has one; a loop that
was unrolled counts in larger steps. A collective counts with the size of its result on
one device, as often as the loops around it run. One that goes on behind other work is
written in each fusion that it goes on in, always with the same channel: it counts once.
"""

import re
from collections import Counter

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

_WIDTH = {"pred": 1, "s4": 1, "u4": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_WIDTH |= {"s64": 8, "u64": 8, "f64": 8}  # others: eight bits are f8..., s8, u8

_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALL = re.compile(r"(?:body|to_apply|calls|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_NUMBER = re.compile(r"%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
_ELEMENT = re.compile(r"= [su]32\[\]\S* get-tuple-element\(.*index=(\d+)")
_NAME = re.compile(r"%?([\w.\-]+)")
_RESULT = re.compile(r"= (.*?) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


def moved(text: str, repeats: int = 1) -> dict[str, int]:
    """Bytes by kind of collective. Loops whose length is data run `repeats` times."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            name = head[1]
            computations[name] = []
            if line.startswith("ENTRY"):
                entry = name
        elif name and line.startswith("  "):
            computations[name].append(line)
    known: dict[str, Counter] = {}

    def of(name: str) -> Counter:
        if name not in known:
            known[name] = Counter()
            begun: set[str] = set()
            for line in computations.get(name, ()):
                known[name] += of_line(line, begun)
        return known[name]

    def of_line(line: str, begun: set[str]) -> Counter:
        result = _RESULT.search(line)
        if not result:
            return Counter()
        operation = result[2].removesuffix("-start")
        if operation in KINDS:
            return Counter({operation: _size(result[1], result[2])})
        inside = Counter()
        for called in _CALL.findall(line) + _named(_BRANCHES.search(line)):
            lines = "\n".join(computations.get(called, ()))
            channels = set(_CHANNEL.findall(lines))
            if operation != "fusion" or not channels or channels - begun:
                inside += of(called)
            begun |= channels
        if operation != "while" or not inside:
            return inside
        times = _trips(line, computations) or repeats
        return Counter({kind: times * size for kind, size in inside.items()})

    return dict(of(entry))


def _trips(line: str, computations: dict[str, list[str]]) -> int | None:
    """How often a loop runs, if its condition says so."""
    condition, body = _CONDITION.search(line), _BODY.search(line)
    asked = computations.get(condition[1], []) if condition else []
    limit = max((int(n) for _, n in _NUMBER.findall("\n".join(asked))), default=None)
    counters = _ELEMENT.findall("\n".join(asked))
    if limit is None or body is None or len(counters) != 1:
        return limit
    return -(-limit // _step(computations[body[1]], int(counters[0])))


def _step(body: list[str], counter: int) -> int:
    """What a loop's body adds to an element of what it carries; 1 where it does not
    say."""
    carried = next(line for line in body if line.lstrip().startswith("ROOT"))
    _, _, carried = re.sub(r"/\*.*?\*/", "", carried).partition(" tuple(")
    next_one = _NAME.findall(carried.split(")")[0])[counter : counter + 1]
    numbers = dict(_NUMBER.findall("\n".join(body)))
    for line in body:
        name, _, rest = line.strip().partition(" = ")
        if next_one == [name.removeprefix("%")] and " add(" in rest:
            terms = _NAME.findall(rest.partition(" add(")[2].split(")")[0])
            return next((int(numbers[t]) for t in terms if t in numbers), 1)
    return 1


def _named(branches: re.Match | None) -> list[str]:
    return re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []


def _size(shape: str, operation: str) -> int:
    """Bytes of a result; that of a started collective is (its operands, its result)."""
    sizes = []
    for kind, dimensions in _ARRAY.findall(shape):
        count = 1
        for size in filter(None, dimensions.split(",")):
            count *= int(size)
        width = _WIDTH.get(kind, 1 if "8" in kind else 4)
        sizes.append(count * width)
    if operation.endswith("-start") and operation != "all-reduce-start":
        return max(sizes, default=0)
    return sum(sizes)
