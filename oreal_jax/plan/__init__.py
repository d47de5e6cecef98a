"""A run before its devices are rented: does it fit, how long is a step, what limits it.

`plan` compiles every program of a run for a TPU topology with the TPU's own compiler,
at the sizes of the config; nothing is executed. For GPUs it estimates by formula.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from oreal_jax.checkpoints.published import PUBLISHED
from oreal_jax.checkpoints.source import open_model
from oreal_jax.config import TrainConfig
from oreal_jax.errors import InputError
from oreal_jax.model import ModelConfig
from oreal_jax.plan import estimate, programs, roofline
from oreal_jax.plan.compiler import compile_program, devices_of, host_of, memory_of
from oreal_jax.plan.decoding import DecodingEstimate, decoding, lengths_of
from oreal_jax.plan.findings import DRAWING, Compiled, Findings
from oreal_jax.sampling.work import PAGE

HEADROOM = 0.1  # of the memory, for what a compiler cannot know
GAIN = 0.99  # of the time of decoding, above which a larger cache is not worth a word


class LargerCache(NamedTuple):
    """A cache for which there is room, and how decoding is faster with it."""

    cache_tokens: int
    decoding: DecodingEstimate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a run on a topology: findings and, if it fits, bounds of a step's
    phases where completions have `mean_tokens` tokens on average, `tokens` in a step
    with their prompts; a larger cache, where there is memory for it and decoding gains
    from it."""

    topology: str
    mean_tokens: int
    tokens: int
    found: Findings
    phases: dict[str, roofline.Phase] = dataclasses.field(default_factory=dict)
    decoding: DecodingEstimate | None = None
    larger_cache: LargerCache | None = None

    @property
    def largest(self) -> Compiled:
        """The program that decides whether the run fits: the first that does not
        compile, else that of the highest peak."""
        failed = [program for program in self.found.programs if program.error]
        return failed[0] if failed else max(self.found.programs, key=lambda p: p.peak)

    @property
    def headroom(self) -> float:
        """Share of the memory that is left in the worst moment; below 0: too large."""
        return 1 - self.largest.peak / self.found.memory

    @property
    def fits(self) -> bool:
        """Whether everything compiles and leaves `HEADROOM`."""
        return not self.largest.error and self.headroom >= HEADROOM

    @property
    def seconds(self) -> float:
        """Of a step at least."""
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def tokens_per_second(self) -> float:
        """Of a device in a whole step, at most: prompts and completions of all samples,
        as other projects count them."""
        return self.tokens / self.seconds / self.found.devices

    def as_json(self) -> dict[str, Any]:
        """All of it in plain values."""
        found = self.found._asdict()
        larger = self.larger_cache
        return {
            "topology": self.topology,
            "mean_tokens": self.mean_tokens,
            "tokens": self.tokens,
            **found,
            "programs": [program._asdict() for program in self.found.programs],
            "phases": {
                name: phase._asdict() | {"limit": phase.limit}
                for name, phase in self.phases.items()
            },
            "decoding": self.decoding and _plain(self.decoding),
            "largest": self.largest.name,
            "larger_cache": larger
            and {"cache_tokens": larger.cache_tokens} | _plain(larger.decoding),
            "headroom": self.headroom,
            "fits": self.fits,
            "seconds": self.seconds if self.phases else None,
            "tokens_per_second": self.tokens_per_second if self.phases else None,
        }


def _plain(decoding: DecodingEstimate) -> dict[str, Any]:
    """In plain values, of its bound the seconds."""
    values = decoding._asdict()
    return values | {"seconds": values.pop("phase").seconds}


def plan(
    config: TrainConfig,
    topology: str,
    mean_tokens: int,
    on_program: Callable[[str], None] = lambda name: None,
) -> Plan:
    """Plans a run of `config` on a topology, for completions of `mean_tokens` tokens on
    average; `on_program` hears the name of each program before it is compiled.

    Raises:
        InputError: an unknown model or topology, a mesh that does not fit it, or a mean
            above the longest.
    """
    if mean_tokens > config.sampling.max_tokens:
        raise InputError(
            f"--mean-tokens {mean_tokens} exceeds sampling.max_tokens="
            f"{config.sampling.max_tokens}"
        )
    shape = shape_of(config)
    lengths = lengths_of(config, mean_tokens)
    learned = programs.learned(config, lengths)
    if topology.split(":")[0] in estimate.GPUS:
        found = estimate.estimated(config, shape, topology, learned)
    else:
        found = compiled(config, shape, topology, learned, on_program)
    made = Plan(
        topology=topology,
        mean_tokens=mean_tokens,
        tokens=int(lengths.sum()) + lengths.size * programs.mean_prompt(config),
        found=found,
    )
    if not made.fits:
        return made
    decoded = decoding(config, shape, found, lengths, found.cache_tokens)
    phases = roofline.phases(config, shape, found, learned, decoded.phase)
    made = dataclasses.replace(made, phases=phases, decoding=decoded)
    longest = config.max_prompt_tokens + config.sampling.max_tokens
    room = min(_room(found), found.slots * longest) // PAGE * PAGE
    if room <= found.cache_tokens:
        return made
    faster = decoding(config, shape, found, lengths, room)
    if faster.phase.seconds > GAIN * decoded.phase.seconds:
        return made
    return dataclasses.replace(made, larger_cache=LargerCache(room, faster))


def _room(found: Findings) -> int:
    """Tokens of cache that fit, `HEADROOM` left, where decoding has the rest."""
    drawing = max(p.peak for p in found.programs if p.phase in DRAWING)
    left = (1 - HEADROOM) * found.memory - drawing
    a_token = found.sampling["cache"] / found.cache_tokens
    return found.cache_tokens + int(left / a_token)


def compiled(
    config: TrainConfig,
    shape: ModelConfig,
    topology: str,
    learned: list[tuple[int, int]],
    on_program: Callable[[str], None],
) -> Findings:
    """What the compiler finds, where a step learns from `learned` (prompt, completion)
    lengths. It stops at the first program that does not fit."""
    devices = devices_of(topology)
    host = host_of(topology, devices)
    run = programs.layout(config, shape, devices, host, learned)
    made = []
    for program in programs.programs(config, shape, run):
        on_program(program.name)
        made.append(compile_program(program))
        if made[-1].error:
            break
    size, engine = run.size, run.engine
    cache = engine.programs.abstract(size).cache
    return Findings(
        kind=devices[0].device_kind,
        memory=memory_of(devices[0]),
        devices=len(devices),
        processes=run.processes,
        micros=run.micros,
        mesh=dict(run.mesh.shape),
        tensor=engine.mesh.shape["tensor"],
        slots=size.slots,
        cache_tokens=size.pages * PAGE,
        held=run.bytes,
        sampling={
            "weights": programs.on_device(run.weights),
            "cache": programs.on_device(cache),
        },
        programs=made,
        moved=moved_by_phase(made),
    )


def shape_of(config: TrainConfig) -> ModelConfig:
    """The shape of a config's model: of a local directory, or as it is published.

    Raises:
        InputError: neither.
    """
    if not Path(config.model).exists() and config.model in PUBLISHED:
        return PUBLISHED[config.model]
    return open_model(config.model).config


def moved_by_phase(compiled: list[Compiled]) -> dict[str, int]:
    """Bytes through a device's links: once through each phase, of "decode" one step."""
    moved: dict[str, int] = dict.fromkeys(
        ("prefill", "decode", "ref", "update_actor"), 0
    )
    for program in compiled:
        if program.phase in moved:
            most = max(moved[program.phase], sum(program.moved.values()))
            moved[program.phase] = most
    return moved
