"""What is found out about a run on a topology, by a compiler or by formula."""

from typing import NamedTuple

# Phases in which decoding's weights and cache are held.
DRAWING = ("gen", "prefill", "decode")


class Compiled(NamedTuple):
    """A program on one device, in bytes: what it is given, makes anew and needs in
    between, and its peak with what lies beside it. `error` is the compiler's where it
    does not fit (`peak` then is what it wanted). `moved` is by kind of collective, once
    through the program."""

    name: str
    phase: str
    arguments: int
    outputs: int
    temporary: int
    beside: int
    peak: int
    moved: dict[str, int]
    seconds: float
    error: str = ""


class Findings(NamedTuple):
    """A run on `devices` of a `kind` in `processes`. Sizes are bytes on one device.

    `memory` is what programs may use. A step's batch is `micros` micro-batches. An
    engine is `tensor` devices with so many slots and tokens of cache. `held` is what
    stays from step to step, `sampling` what decoding adds; `moved` is by phase, through
    a device's links (in "decode", for one token a row).
    """

    kind: str
    memory: int
    devices: int
    processes: int
    micros: int
    mesh: dict[str, int]
    tensor: int
    slots: int
    cache_tokens: int
    held: dict[str, int]
    sampling: dict[str, int]
    programs: list[Compiled]
    moved: dict[str, int]
