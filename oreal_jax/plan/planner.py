"""The plan of a run on a topology: memory, lower bounds of time, a larger cache.

For TPUs every program of the run is compiled, at the sizes of its config; for GPUs the
arrays of the run are counted. Nothing is executed.
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
from oreal_jax.plan import compiler, gpus
from oreal_jax.plan.bounds import (
    DecodingEstimate,
    Phase,
    completion_lengths,
    estimate_decoding,
    phases,
)
from oreal_jax.plan.findings import GENERATION, Compiled, Findings
from oreal_jax.plan.programs import (
    layout,
    mean_prompt_tokens,
    programs,
    selected_lengths,
)
from oreal_jax.sampling.runner import PAGE

HEADROOM = 0.1  # share of the memory to leave free
MIN_GAIN = 0.01  # share of decoding's time that a proposed cache saves


class LargerCache(NamedTuple):
    """A cache that fits, and decoding with it."""

    cache_tokens: int
    decoding: DecodingEstimate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A run on a topology, for completions of `mean_tokens` tokens on average.

    tokens: of a step, with prompts.
    phases, decoding, larger_cache: missing if the run does not fit, the last also if it
        would not help.
    """

    topology: str
    mean_tokens: int
    tokens: int
    findings: Findings
    phases: dict[str, Phase] = dataclasses.field(default_factory=dict)
    decoding: DecodingEstimate | None = None
    larger_cache: LargerCache | None = None

    @property
    def largest(self) -> Compiled:
        """The program that does not compile, else that of the highest peak."""
        return max(self.findings.programs, key=lambda p: (bool(p.error), p.peak))

    @property
    def headroom(self) -> float:
        """Share of the memory that is free at the highest peak; may be negative."""
        return 1 - self.largest.peak / self.findings.memory

    @property
    def fits(self) -> bool | None:
        """Whether all programs leave `HEADROOM`; None without temporary memory."""
        if self.largest.error or self.headroom < HEADROOM:
            return False
        return None if self.largest.temporary is None else True

    @property
    def seconds(self) -> float:
        """Lower bound of a step."""
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def tokens_per_second(self) -> float:
        """Upper bound per device, of prompts and completions over the whole step."""
        return self.tokens / self.seconds / self.findings.devices

    def as_json(self) -> dict[str, Any]:
        """Return the plan in plain values."""
        larger = self.larger_cache
        return {
            "topology": self.topology,
            "mean_tokens": self.mean_tokens,
            "tokens": self.tokens,
            **self.findings._asdict(),
            "programs": [program._asdict() for program in self.findings.programs],
            "phases": {
                name: phase._asdict() | {"limit": phase.limit}
                for name, phase in self.phases.items()
            },
            "decoding": self.decoding and _decoding_json(self.decoding),
            "largest": self.largest.name,
            "larger_cache": larger
            and {"cache_tokens": larger.cache_tokens} | _decoding_json(larger.decoding),
            "headroom": self.headroom,
            "fits": self.fits,
            "seconds": self.seconds if self.phases else None,
            "tokens_per_second": self.tokens_per_second if self.phases else None,
        }


def _decoding_json(decoding: DecodingEstimate) -> dict[str, Any]:
    values = decoding._asdict()
    return values | {"seconds": values.pop("phase").seconds}


def make_plan(
    config: TrainConfig,
    topology: str,
    mean_tokens: int,
    on_program: Callable[[str], None] = lambda name: None,
) -> Plan:
    """Plan a run for completions of `mean_tokens` tokens on average.

    `on_program` receives the name of each program before it is compiled.

    Raises:
        InputError: an unknown model or topology, a mesh, engine or cache that does not
            match them, or a mean above `sampling.max_tokens`.
    """
    if mean_tokens > config.sampling.max_tokens:
        raise InputError(
            f"--mean-tokens {mean_tokens} exceeds sampling.max_tokens="
            f"{config.sampling.max_tokens}"
        )
    shape = load_shape(config)
    lengths = completion_lengths(config, mean_tokens)
    selected = selected_lengths(config, lengths)
    findings = investigate(config, shape, topology, selected, on_program)
    plan = Plan(
        topology=topology,
        mean_tokens=mean_tokens,
        tokens=int(lengths.sum()) + lengths.size * mean_prompt_tokens(config),
        findings=findings,
    )
    if plan.fits is False:
        return plan
    cache_tokens = findings.cache_tokens
    decoding = estimate_decoding(config, shape, findings, lengths, cache_tokens)
    bounds = phases(config, shape, findings, selected, decoding.phase)
    plan = dataclasses.replace(plan, phases=bounds, decoding=decoding)
    longest = config.max_prompt_tokens + config.sampling.max_tokens
    limit = min(_cache_limit(findings), findings.slots * longest) // PAGE * PAGE
    if limit <= cache_tokens:
        return plan
    faster = estimate_decoding(config, shape, findings, lengths, limit)
    if faster.phase.seconds > (1 - MIN_GAIN) * decoding.phase.seconds:
        return plan
    return dataclasses.replace(plan, larger_cache=LargerCache(limit, faster))


def _cache_limit(findings: Findings) -> int:
    """Return the tokens of cache that leave `HEADROOM` while generating."""
    peak = max(p.peak for p in findings.programs if p.phase in GENERATION)
    free = (1 - HEADROOM) * findings.memory - peak
    token_bytes = findings.sampling["cache"] / findings.cache_tokens
    return findings.cache_tokens + int(free / token_bytes) - PAGE  # page 0 is unused


def investigate(
    config: TrainConfig,
    shape: ModelConfig,
    topology: str,
    selected: list[tuple[int, int]],
    on_program: Callable[[str], None] = lambda name: None,
) -> Findings:
    """Measure the programs of a run on a topology, up to the first that does not fit.

    `selected` are (prompt, completion) lengths of the sequences that a step trains on.
    """
    if topology.partition(":")[0] in gpus.GPUS:
        devices = gpus.gpu_devices(topology)
        own = devices[: gpus.PER_PROCESS]
        memory, measure = gpus.gpu_memory(topology), gpus.measure_arguments
    else:
        devices = compiler.tpu_devices(topology)
        own = compiler.tpu_host(topology, devices)
        memory, measure = compiler.tpu_memory(devices[0]), compiler.compile_program
    run = layout(config, shape, devices, own, selected)
    measured = []
    for program in programs(config, shape, run):
        on_program(program.name)
        measured.append(measure(program))
        if measured[-1].error:
            break
    return Findings(
        kind=devices[0].device_kind,
        memory=memory,
        devices=len(devices),
        processes=run.processes,
        micros=run.micros,
        mesh=dict(run.mesh.shape),
        tensor=run.engine.mesh.shape["tensor"],
        slots=run.size.slots,
        cache_tokens=run.size.pages * PAGE,
        held=run.held,
        sampling=run.sampling,
        programs=measured,
        moved={
            phase: max(
                (sum(p.moved.values()) for p in measured if p.phase == phase), default=0
            )
            for phase in ("prefill", "decode", "ref", "update_actor")
        },
    )


def load_shape(config: TrainConfig) -> ModelConfig:
    """Return the shape of a config's model, of a local directory or as published.

    Raises:
        InputError: it is neither.
    """
    if not Path(config.model).exists() and config.model in PUBLISHED:
        return PUBLISHED[config.model]
    return open_model(config.model).config
