"""A run before its devices are rented: does it fit, how long is a step, what limits it.

`plan` compiles every program of a run for a TPU topology with the TPU's own compiler,
at the sizes of the config; nothing is executed.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oreal_jax import sharding
from oreal_jax.checkpoints.source import open_model
from oreal_jax.config import TrainConfig
from oreal_jax.efficiency import PEAKS
from oreal_jax.model import ModelConfig
from oreal_jax.model.published import PUBLISHED
from oreal_jax.plan import programs, roofline
from oreal_jax.plan.compiler import Compiled, compile, devices_of, host_of, memory_of
from oreal_jax.sampling.engine import PAGE

HEADROOM = 0.1  # of the memory, for what a compiler cannot know


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A run on a topology. Sizes are bytes on one device.

    `held` is what stays from step to step; `needed` what the largest program wants,
    with all that lies beside it.
    """

    topology: str
    device: str
    devices: int
    processes: int
    mesh: dict[str, int]
    engine: dict[str, int]
    capacity: int
    held: dict[str, int]
    sampling: dict[str, int]
    programs: list[Compiled]
    phases: dict[str, roofline.Phase]
    mean_tokens: int

    @property
    def largest(self) -> Compiled:
        """The program that decides whether the run fits: the first that does not
        compile, else that of the highest peak."""
        failed = [program for program in self.programs if program.error]
        return failed[0] if failed else max(self.programs, key=lambda p: p.peak)

    @property
    def headroom(self) -> float:
        """Share of the memory that is left in the worst moment; below 0: too large."""
        return 1 - self.largest.peak / self.capacity

    @property
    def fits(self) -> bool:
        """Whether everything compiles and leaves `HEADROOM`."""
        return not self.largest.error and self.headroom >= HEADROOM

    @property
    def seconds(self) -> float:
        """Of a step at least."""
        return sum(phase.seconds for phase in self.phases.values())

    def as_json(self) -> dict[str, Any]:
        """All of it in plain values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {
            "programs": [program._asdict() for program in self.programs],
            "phases": {
                name: phase._asdict() | {"seconds": phase.seconds, "limit": phase.limit}
                for name, phase in self.phases.items()
            },
            "largest": self.largest.name,
            "headroom": self.headroom,
            "fits": self.fits,
            "seconds": self.seconds,
        }


def plan(
    config: TrainConfig,
    topology: str,
    mean_tokens: int,
    on_program: Callable[[str], None] = lambda name: None,
) -> Plan:
    """Plans a run of `config` on a topology, for completions of `mean_tokens` tokens on
    average; `on_program` hears the name of each program before it is compiled.

    Raises:
        BadInput: an unknown model or topology, or a mesh that does not fit it.
    """
    shape = shape_of(config)
    devices = devices_of(topology)
    host = host_of(topology, devices)
    run = programs.layout(config, shape, devices, host, mean_tokens)
    compiled = []
    for program in programs.programs(config, shape, run):
        on_program(program.name)
        compiled.append(compile(program))
        if compiled[-1].error:
            break
    device = devices[0]
    size, engine = run.size, run.engine
    cache = programs.on_device(engine.programs.abstract(size.slots, size.pages).cache)
    tensor = engine.mesh.shape["tensor"]
    in_cache = size.pages * PAGE // (programs.mean_prompt(config) + mean_tokens // 2)
    rows = max(1, min(size.slots, in_cache))
    used = roofline.Devices(len(devices), tensor, rows, PEAKS[device.device_kind])
    held = run.bytes
    packed = run.micros * run.batch.tokens.shape[1] * config.packing.row_length
    return Plan(
        topology=topology,
        device=device.device_kind,
        devices=len(devices),
        processes=run.processes,
        mesh=dict(run.mesh.shape),
        engine={
            "devices": tensor,
            "engines": sharding.row_ways(engine.mesh) * run.processes,
            "slots": size.slots,
            "rows": rows,
            "cache_tokens": size.pages * PAGE,
        },
        capacity=memory_of(device),
        held=held,
        sampling={
            "weights": programs.on_device(run.weights),
            "cache": cache,
        },
        programs=compiled,
        phases=roofline.phases(
            config,
            shape,
            used,
            run.lengths,
            packed,
            run.micros,
            held["parameters"] + held["optimizer"],
            mean_tokens,
            moved_by_phase(compiled),
        ),
        mean_tokens=mean_tokens,
    )


def shape_of(config: TrainConfig) -> ModelConfig:
    """The shape of a config's model: of a local directory, or as it is published.

    Raises:
        BadInput: neither.
    """
    if not Path(config.model).exists() and config.model in PUBLISHED:
        return PUBLISHED[config.model]
    return open_model(config.model).config


def moved_by_phase(compiled: list[Compiled]) -> dict[str, int]:
    """Bytes through a device's links: once through each phase, of "decode" one step."""
    moved = Counter({"prefill": 0, "decode": 0, "ref": 0, "update_actor": 0})
    for program in compiled:
        phase = program.name.split()[0] if program.phase == "gen" else program.phase
        moved[phase] = max(moved[phase], sum(program.moved.values()))
    return dict(moved)
