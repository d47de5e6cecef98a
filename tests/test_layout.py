"""Imports point down the layout without cycles; names and texts use plain words."""

import ast
import graphlib
import re
import tokenize
from collections.abc import Iterator
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
    loading
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
    console program_cache hardware hub
    files
    errors shapes field_texts
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
    """Return the modules of this project that a file imports, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if name in MODULES else node.module for name in full}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & MODULES.keys() - {"oreal_jax"}


def place(module: str) -> tuple[int, str]:
    """Return the line of a module in the layout, and the name it has there."""
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


# Names are nouns and verbs: no participles, no superlatives, no metaphors, and nothing
# that a machine cannot do ("say").
WORDS = re.compile(
    r"found|made|drawn|said|given|asked|told|taken|wanted|left|rest|whole"
    r"|(.*_)?(say|hear|ask|tell|heed)s?(_.*)?"
    r"|(.*_)?(room|house|ear|laboratory|examination|[Pp]layer)(_.*)?"
    r"|(.*_)?(MOST|LEAST|FEWEST|LARGEST|SMALLEST|LONGEST|SHORTEST|STEEPEST)(_.*)?"
    r"|(of|require)_.*|.*_of"
)
# Of messages, docstrings and comments. (A problem may ask for something.)
PHRASES = re.compile(
    r"\b(anew|in vain|lies|go(es)? on|mends?|so many|behind|says?|said|hears?|heeds?"
    r"|(?<!problem )asks?)\b"
)


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines and names of definitions, without fields, which are part of formats."""
    fields: set[ast.AST] = set()
    for node in ast.walk(tree):  # classes come before what they contain
        if isinstance(node, ast.ClassDef):
            fields |= {n.target for n in node.body if isinstance(n, ast.AnnAssign)}
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            if node not in fields:
                yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Lines and texts of strings and comments."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", 0)}
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type in kinds:
                for offset, line in enumerate(token.string.split("\n")):
                    yield token.start[0] + offset, line


def test_names_and_texts_use_plain_words():
    offences = []
    for path in [*ROOT.rglob("*.py"), *(ROOT.parent / "tools").glob("*.py")]:
        defined = list(names(ast.parse(path.read_text())))
        if "right" in {name for _, name in defined}:  # the left side
            defined = [(line, name) for line, name in defined if name != "left"]
        matches = [(line, WORDS.fullmatch(name)) for line, name in defined]
        if path.name != "wording.py":  # its patterns are for what answers say
            matches += [(line, PHRASES.search(text)) for line, text in texts(path)]
        place = path.relative_to(ROOT.parent)
        offences += [f"{place}:{line}: {m[0]}" for line, m in matches if m]
    assert not offences, "\n".join(offences)
