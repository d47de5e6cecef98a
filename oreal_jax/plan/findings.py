"""What a plan learns about a run on a topology: programs, memory, collectives."""

from typing import NamedTuple

GENERATION = ("gen", "prefill", "decode")  # phases that hold the engine's arrays


class Compiled(NamedTuple):
    """Memory of a program on one device, in bytes.

    `outputs` excludes those that reuse an argument. `beside` is what the run holds that
    is no argument of this program; `peak` includes it. `temporary` is None where no
    compiler reports it, and `peak` then a lower bound. `moved` is by kind of
    collective, for one execution. `error` is the compiler's where the program does not
    fit; `peak` is then what it would need.
    """

    name: str
    phase: str
    arguments: int
    outputs: int
    temporary: int | None
    beside: int
    peak: int
    moved: dict[str, int]
    seconds: float
    error: str = ""


class Findings(NamedTuple):
    """A run on `devices` of a `kind` in `processes`. Sizes are bytes on one device.

    `memory` is available to programs. A step's batch has `micros` micro-batches. An
    engine has `tensor` devices, `slots` slots and `cache_tokens` tokens of cache.
    `held` is kept from step to step, `sampling` is added while generating. `moved` is
    what each phase sends through a device's links ("decode": one token per slot).
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
