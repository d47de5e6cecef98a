"""Print a plan: memory, programs, collectives, bounds, and whether the run fits."""

from rich.console import Console
from rich.table import Table

from oreal_jax.plan.bounds import DecodingEstimate
from oreal_jax.plan.findings import GENERATION, Findings
from oreal_jax.plan.planner import HEADROOM, LargerCache, Plan


def show(plan: Plan, console: Console) -> None:
    """Print a plan, its conclusion last."""
    findings = plan.findings
    lines = lambda *texts: console.print(*texts, sep="\n", markup=False, soft_wrap=True)
    axes = " x ".join(f"{name} {n}" for name, n in findings.mesh.items() if n > 1)
    arrays = findings.held | {f"decoding {k}": v for k, v in findings.sampling.items()}
    lines(
        f"{plan.topology}: {findings.devices} x {findings.kind} in "
        f"{findings.processes} process(es), mesh {axes or 'of one device'}; "
        f"{findings.devices // findings.tensor} engines of {findings.tensor} "
        f"device(s), {findings.slots} slots and {findings.cache_tokens:,} tokens of "
        "cache each",
        "on a device, GiB: "
        + ", ".join(f"{name} {_gib(size)}" for name, size in arrays.items())
        + f"; capacity {_gib(findings.memory)}",
    )
    console.print(_programs(findings))
    if any(program.moved for program in findings.programs):
        console.print(_collectives(findings))
    if plan.decoding:
        console.print(_phases(plan))
        lines(_decoding(plan, plan.decoding))
        if plan.larger_cache:
            lines(_advice(plan.decoding, plan.larger_cache))
    lines(conclusion(plan))


def conclusion(plan: Plan) -> str:
    """Return one line: whether the run fits, by its largest program."""
    largest, arrays = plan.largest, plan.findings.held
    bound = "" if largest.temporary is not None else "at least "
    needs = (
        f"{plan.topology}: {largest.name} needs {bound}{_gib(largest.peak)} GiB of "
        f"{_gib(plan.findings.memory)} GiB"
    )
    if plan.fits:
        return f"{needs}: fits, {plan.headroom:.0%} left"
    if plan.fits is None:
        return (
            f"{needs}; activations, gradients and other temporaries are not known "
            "without a GPU, nor is traffic between GPUs: whether the run fits is open"
        )
    if largest.phase in GENERATION:
        arrays = arrays | plan.findings.sampling
    arrays = arrays | {"activations and other temporaries": largest.temporary or 0}
    most = max(arrays, key=lambda name: arrays[name])
    return (
        f"{needs}: does not fit with {HEADROOM:.0%} to spare; "
        f"{_gib(largest.beside)} GiB of it are not the program's; largest: {most}, "
        f"{_gib(arrays[most])} GiB" + (f" ({largest.error})" if largest.error else "")
    )


def _decoding(plan: Plan, decoding: DecodingEstimate) -> str:
    return (
        f"decoding: {decoding.steps:,} steps, on average {decoding.rows:,.1f} of an "
        f"engine's {plan.findings.slots} slots in use, {decoding.swapped:,} rows "
        f"swapped out; at most {plan.tokens_per_second:,.0f} tokens/s per device over "
        "the whole step"
    )


def _advice(now: DecodingEstimate, larger: LargerCache) -> str:
    then = larger.decoding
    return (
        f"cache_tokens={larger.cache_tokens} fits: an engine holds {then.rows:,.1f} "
        f"rows on average instead of {now.rows:,.1f}, decoding takes "
        f"{then.phase.seconds:,.0f} s at least instead of {now.phase.seconds:,.0f} s"
    )


def _table(first: str, *others: str, caption: str) -> Table:
    table = Table(first, caption=caption)
    table.columns[0].no_wrap = True
    for title in others:
        table.add_column(title, justify="right")
    return table


def _programs(findings: Findings) -> Table:
    titles = "arguments", "temporary", "others", "peak"
    table = _table("program", *titles, caption="GiB on a device")
    for program in findings.programs:
        sizes = (program.arguments, program.temporary, program.beside, program.peak)
        table.add_row(program.name, *map(_gib, sizes))
    return table


def _collectives(findings: Findings) -> Table:
    kinds = sorted({kind for program in findings.programs for kind in program.moved})
    caption = "GiB moved by collectives on a device; decode: one token per slot"
    table = _table("collectives", *kinds, caption=caption)
    for program in findings.programs:
        if program.moved:
            sizes = (program.moved.get(kind, 0) for kind in kinds)
            table.add_row(program.name, *map(_gib, sizes))
    return table


def _phases(plan: Plan) -> Table:
    titles = "TFLOP", "products", "memory", "links", "at least", "limited by"
    caption = (
        f"a step takes {plan.seconds:,.0f} s at least, with completions of "
        f"{plan.mean_tokens:,} tokens on average, {plan.findings.micros} micro-batches "
        "and every part at its peak"
    )
    table = _table("phase", *titles, caption=caption)
    for name, phase in plan.phases.items():
        times = (phase.products, phase.memory, phase.links, phase.seconds)
        table.add_row(
            name,
            f"{phase.flops / 1e12:,.0f}",
            *(f"{seconds:,.2f} s" for seconds in times),
            phase.limit,
        )
    return table


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:,.2f}"
