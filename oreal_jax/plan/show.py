"""A plan as a page to read."""

from rich.console import Console
from rich.table import Table

from oreal_jax.plan import HEADROOM, Plan

GIB = 2**30


def show(plan: Plan, console: Console) -> None:
    """Prints what lies in a device's memory, the programs, and a step's bounds."""
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1)
    engine = plan.engine
    console.print(
        f"{plan.topology}: {plan.devices} x {plan.device} in {plan.processes} "
        f"process(es), mesh {axes or 'of one device'}; {engine['engines']} engines of "
        f"{engine['devices']} device(s), {engine['slots']} slots and "
        f"{engine['cache_tokens']:,} tokens of cache each",
        markup=False,
        soft_wrap=True,
    )
    parts = plan.held | {f"decoding {k}": v for k, v in plan.sampling.items()}
    console.print(
        "on a device, GiB: "
        + ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
        + f"; capacity {_gib(plan.capacity)}",
        markup=False,
        soft_wrap=True,
    )
    for table in (_programs(plan), _collectives(plan), _phases(plan)):
        console.print(table)
    console.print(why(plan), markup=False, soft_wrap=True)


def why(plan: Plan) -> str:
    """One line: whether the run fits, and what decides."""
    worst = plan.largest
    said = (
        f"{plan.topology}: {worst.name} needs {_gib(worst.peak)} GiB of "
        f"{_gib(plan.capacity)} GiB"
    )
    if plan.fits:
        return f"{said}: fits, {plan.headroom:.0%} left"
    parts = plan.held if worst.phase != "gen" else plan.held | plan.sampling
    parts = parts | {"activations and other temporaries": worst.temporary}
    if worst.error:
        parts.pop("activations and other temporaries")
    most = max(parts, key=lambda name: parts[name])
    return (
        f"{said}: does not fit with {HEADROOM:.0%} to spare; beside it lie "
        f"{_gib(worst.beside)} GiB; largest: {most}, {_gib(parts[most])} GiB"
        + (f" ({worst.error})" if worst.error else "")
    )


def _programs(plan: Plan) -> Table:
    table = Table("program", caption="GiB on a device")
    for title in ("arguments", "temporary", "beside", "peak"):
        table.add_column(title, justify="right", no_wrap=True)
    for program in plan.programs:
        sizes = (program.arguments, program.temporary, program.beside, program.peak)
        table.add_row(program.name, *map(_gib, sizes))
    return table


def _collectives(plan: Plan) -> Table:
    kinds = sorted({kind for program in plan.programs for kind in program.moved})
    table = Table(
        "moved",
        caption="GiB by collectives on a device, once through; decode: a token a row",
    )
    table.columns[0].no_wrap = True
    for kind in kinds:
        table.add_column(kind, justify="right")
    for program in plan.programs:
        if program.moved:
            sizes = (program.moved.get(kind, 0) for kind in kinds)
            table.add_row(program.name, *map(_gib, sizes))
    return table


def _phases(plan: Plan) -> Table:
    table = Table("phase")
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
        f"{plan.mean_tokens:,} tokens on average and every part at its peak"
    )
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"
