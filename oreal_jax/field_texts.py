"""The documentation of dataclass fields: the string below each field.

It is read from the source, so that `--help` need not import JAX.
"""

import ast
import functools
from pathlib import Path


@functools.cache
def class_node(path: Path, name: str) -> ast.ClassDef:
    """Return the class of that name in a file."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return next(n for n in body if isinstance(n, ast.ClassDef) and n.name == name)


def field_texts(node: ast.ClassDef) -> dict[str, str]:
    """Return the text of every field, "" for a field without."""
    texts = {}
    for field, following in zip(node.body, [*node.body[1:], None], strict=True):
        match field, following:
            case ast.AnnAssign(), ast.Expr(value=ast.Constant(value=str(text))):
                texts[ast.unparse(field.target)] = " ".join(text.split())
            case ast.AnnAssign(), _:
                texts[ast.unparse(field.target)] = ""
    return texts
