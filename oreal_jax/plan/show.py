"""A plan as a page to read."""

from rich.console import Console
from rich.table import Table

from oreal_jax.plan import HEADROOM, LargerCache, Plan
from oreal_jax.plan.decoding import DecodingEstimate
from oreal_jax.plan.findings import DRAWING, Findings

GIB = 2**30


def show(plan: Plan, console: Console) -> None:
    """Prints what lies in a device's memory, the programs, and a step's bounds."""
    found = plan.found
    axes = " x ".join(f"{name} {size}" for name, size in found.mesh.items() if size > 1)
    console.print(
        f"{plan.topology}: {found.devices} x {found.kind} in {found.processes} "
        f"process(es), mesh {axes or 'of one device'}; "
        f"{found.devices // found.tensor} engines of {found.tensor} device(s), "
        f"{found.slots} slots and {found.cache_tokens:,} tokens of cache each",
        markup=False,
        soft_wrap=True,
    )
    parts = found.held | {f"decoding {k}": v for k, v in found.sampling.items()}
    console.print(
        "on a device, GiB: "
        + ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
        + f"; capacity {_gib(found.memory)}",
        markup=False,
        soft_wrap=True,
    )
    console.print(_programs(found))
    if any(program.moved for program in found.programs):
        console.print(_collectives(found))
    if plan.decoding:
        console.print(_phases(plan))
        said = [_decoding(plan, plan.decoding)]
        if plan.larger_cache:
            said.append(_advice(plan.decoding, plan.larger_cache))
        console.print(*said, sep="\n", markup=False, soft_wrap=True)
    console.print(why(plan), markup=False, soft_wrap=True)


def why(plan: Plan) -> str:
    """One line: whether the run fits, and what decides."""
    worst = plan.largest
    said = (
        f"{plan.topology}: {worst.name} needs {_gib(worst.peak)} GiB of "
        f"{_gib(plan.found.memory)} GiB"
    )
    if plan.fits:
        return f"{said}: fits, {plan.headroom:.0%} left"
    parts = plan.found.held
    if worst.phase in DRAWING:
        parts = parts | plan.found.sampling
    parts = parts | {"activations and other temporaries": worst.temporary}
    most = max(parts, key=lambda name: parts[name])
    return (
        f"{said}: does not fit with {HEADROOM:.0%} to spare; beside it lie "
        f"{_gib(worst.beside)} GiB; largest: {most}, {_gib(parts[most])} GiB"
        + (f" ({worst.error})" if worst.error else "")
    )


def _decoding(plan: Plan, decoding: DecodingEstimate) -> str:
    """One line: what the scheduler made of the completions' lengths."""
    return (
        f"decoding: {decoding.steps:,} steps, on average {decoding.rows:,.1f} of an "
        f"engine's {plan.found.slots} slots in use, {decoding.swapped:,} rows swapped "
        f"out; at most {plan.tokens_per_second:,.0f} tokens/s per device over the "
        "whole step"
    )


def _advice(now: DecodingEstimate, larger: LargerCache) -> str:
    then = larger.decoding
    return (
        f"cache_tokens={larger.cache_tokens} fits: an engine holds {then.rows:,.1f} "
        f"rows on average instead of {now.rows:,.1f}, decoding takes "
        f"{then.phase.seconds:,.0f} s at least instead of {now.phase.seconds:,.0f} s"
    )


def _programs(found: Findings) -> Table:
    table = Table("program", caption="GiB on a device")
    for title in ("arguments", "temporary", "beside", "peak"):
        table.add_column(title, justify="right", no_wrap=True)
    for program in found.programs:
        sizes = (program.arguments, program.temporary, program.beside, program.peak)
        table.add_row(program.name, *map(_gib, sizes))
    return table


def _collectives(found: Findings) -> Table:
    kinds = sorted({kind for program in found.programs for kind in program.moved})
    table = Table(
        "moved",
        caption="GiB by collectives on a device, once through; decode: a token a row",
    )
    table.columns[0].no_wrap = True
    for kind in kinds:
        table.add_column(kind, justify="right")
    for program in found.programs:
        if program.moved:
            sizes = (program.moved.get(kind, 0) for kind in kinds)
            table.add_row(program.name, *map(_gib, sizes))
    return table


def _phases(plan: Plan) -> Table:
    table = Table("phase")
    table.columns[0].no_wrap = True
    for title in ("TFLOP", "products", "memory", "links", "at least", "limited by"):
        table.add_column(title, justify="right")
    for name, phase in plan.phases.items():
        times = (phase.products, phase.memory, phase.links, phase.seconds)
        table.add_row(
            name,
            f"{phase.flops / 1e12:,.0f}",
            *(f"{seconds:,.2f} s" for seconds in times),
            phase.limit,
        )
    table.caption = (
        f"a step takes {plan.seconds:,.0f} s at least, with completions of "
        f"{plan.mean_tokens:,} tokens on average, {plan.found.micros} micro-batches "
        "and every part at its peak"
    )
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"
