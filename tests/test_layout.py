"""Imports point down the layout of the packages, and none go in circles."""

import ast
import graphlib
from pathlib import Path

import oreal_jax

# From top to bottom. Modules on one line do not import each other; the longest name
# that a module begins with is its place.
LAYOUT = """
    cli
    report serve plan
    train
    evaluation loss_lab
    config_loading
    config
    trajectory
    checkpoints
    sampling
    train_state
    optimizer
    losses
    data
    verify
    efficiency
    model_parallel
    mesh
    sharding
    model
    distributed
    interrupts cluster
    metrics
    console program_cache hardware
    files
    errors shapes
"""
PLACES = {
    f"oreal_jax.{name}": place
    for place, line in enumerate(LAYOUT.split("\n"))
    for name in line.split()
}
ROOT = Path(oreal_jax.__file__).parent
MODULES = {
    ".".join(["oreal_jax", *path.relative_to(ROOT).with_suffix("").parts])
    .removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """The modules of this project that a file imports, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if name in MODULES else node.module for name in full}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & MODULES.keys() - {"oreal_jax"}


def place(module: str) -> tuple[int, str]:
    """The line of a module in the layout, and the name it has there."""
    parts = module.split(".")
    names = (".".join(parts[:size]) for size in range(len(parts), 1, -1))
    name = next((name for name in names if name in PLACES), None)
    assert name, f"{module} is not in LAYOUT"
    return PLACES[name], name


GRAPH = {module: imports(path) for module, path in MODULES.items()}


def test_imports_point_down_the_layout():
    upward = [
        f"{module} imports {target}"
        for module, targets in GRAPH.items()
        for target in targets
        if module != "oreal_jax"
        and place(module)[1] != place(target)[1]
        and place(module)[0] >= place(target)[0]
    ]
    assert not upward


def test_no_modules_import_each_other():
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError, which lists them
