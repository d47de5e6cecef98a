"""Print a plan: memory, programs, collectives, bounds, and whether the run fits."""

from rich.console import Console
from rich.table import Table

from oreal_jax.console import make_table
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
    tables = [_programs(findings)]
    if any(program.moved for program in findings.programs):
        tables.append(_collectives(findings))
    if plan.decoding:
        tables.append(_phases(plan))
    for table in tables:
        table.columns[0].no_wrap = True
        console.print(table)
    if plan.decoding:
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
        f"{_gib(largest.others)} GiB of it are not the program's; largest: {most}, "
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


def _programs(findings: Findings) -> Table:
    sizes = lambda program: (
        program.arguments,
        program.temporary,
        program.others,
        program.peak,
    )
    return make_table(
        ["program", "arguments", "temporary", "others", "peak"],
        ((each.name, *map(_gib, sizes(each))) for each in findings.programs),
        caption="GiB on a device",
    )


def _collectives(findings: Findings) -> Table:
    kinds = sorted({kind for program in findings.programs for kind in program.moved})
    return make_table(
        ["collectives", *kinds],
        (
            (program.name, *(_gib(program.moved.get(kind, 0)) for kind in kinds))
            for program in findings.programs
            if program.moved
        ),
        caption="GiB moved by collectives on a device; decode: one token per slot",
    )


def _phases(plan: Plan) -> Table:
    seconds = lambda phase: (phase.products, phase.memory, phase.links, phase.seconds)
    return make_table(
        ["phase", "TFLOP", "products", "memory", "links", "at least", "limited by"],
        (
            (
                name,
                f"{phase.flops / 1e12:,.0f}",
                *(f"{each:,.2f} s" for each in seconds(phase)),
                phase.limit,
            )
            for name, phase in plan.phases.items()
        ),
        caption=(
            f"a step takes {plan.seconds:,.0f} s at least, with completions of "
            f"{plan.mean_tokens:,} tokens on average, {plan.findings.micros} "
            "micro-batches and every part at its peak"
        ),
    )


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:,.2f}"
