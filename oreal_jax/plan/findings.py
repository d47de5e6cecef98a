"""Measurements of a run on a topology: programs, memory, collectives."""

from typing import NamedTuple

GENERATION = ("gen", "prefill", "decode")  # phases that hold the engine's arrays


class Compiled(NamedTuple):
    """Memory of a program on one device, in bytes.

    outputs: those that do not reuse an argument.
    temporary: None if no compiler reports it; `peak` is then a lower bound.
    others: arrays of the run that are not arguments of this program; part of `peak`.
    moved: by kind of collective, for one execution.
    error: the compiler's if the program does not fit; `peak` is then its need.
    """

    name: str
    phase: str
    arguments: int
    outputs: int
    temporary: int | None
    others: int
    peak: int
    moved: dict[str, int]
    seconds: float
    error: str = ""


class Findings(NamedTuple):
    """A run on `devices` of a `kind` in `processes`. Sizes are bytes on one device.

    memory: available to programs.
    micros: micro-batches of a step.
    tensor, slots, cache_tokens: devices, slots and cache of an engine.
    held, sampling: arrays between steps, and those added while generating.
    moved: sent through a device's links by each phase ("decode": one token per slot).
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
