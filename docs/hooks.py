"""Tables made from the code, and MkDocs hooks for pages that are not Markdown in docs/.

    python docs/hooks.py

updates the tables in the pages. Each is between the lines `<!-- fields: CLASS -->` or
`<!-- metrics -->` and `<!-- end -->`. The other pages are documents of the repository's
root, and notebooks with their outputs.
"""

import ast
import json
import re
from pathlib import Path

from oreal_jax.field_texts import class_node, field_texts

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    name: name.lower()
    for name in ("BENCHMARKS.md", "CHANGELOG.md", "CONTRIBUTING.md", "README.md")
}


def on_files(files, config):
    """Add the documents of the repository's root and the notebooks as pages."""
    from mkdocs.structure.files import File

    for name, page in OUTSIDE.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    for path in sorted((ROOT / "docs").glob("*.ipynb")):
        page = path.with_suffix(".md").name
        files.append(File.generated(config, page, content=notebook(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Link to pages where the repository links to files."""
    for name, target in OUTSIDE.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{name}", f"]({target}", markdown)
    return re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", markdown)


def notebook(path: Path) -> str:
    """Return a notebook with its outputs in Markdown: texts and PNG pictures."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = "".join(data["image/png"]).replace("\n", "")
                parts.append(f"![output](data:image/png;base64,{picture})")
            else:
                text = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts)


def fields_table(name: str) -> str:
    """Return the documentation of a dataclass: its docstring and a table of its fields.

    A field's text is the string below it; where no field has one, the docstring
    describes them. The source is read, not imported, so that defaults appear as they
    are written.
    """
    path = next(
        path
        for path in (ROOT / "oreal_jax").rglob("*.py")
        if re.search(rf"^class {name}\b", path.read_text(encoding="utf-8"), re.M)
    )
    node = class_node(path, name)
    docstring = (ast.get_docstring(node) or "").partition("\n\nRaises:")[0]
    texts = field_texts(node)
    rows = [
        [
            code(field.target),
            code(field.annotation),
            code(field.value) if field.value else "required",
        ]
        for field in node.body
        if isinstance(field, ast.AnnAssign)
    ]
    header = ["field", "type", "default"]
    if any(texts.values()):
        header.append("meaning")
        rows = [[*row, text] for row, text in zip(rows, texts.values(), strict=True)]
    else:
        docstring = f"```text\n{docstring}\n```"
    return f"{docstring}\n\n{table(header, rows)}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def code(node: ast.expr) -> str:
    """Return an expression as inline code in a cell of a table."""
    text = ast.unparse(node)
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        text = f"{node.value:,}" if not isinstance(node.value, bool) else text
    return "`" + text.replace("'", '"').replace(" | ", " or ") + "`"


def metrics_table() -> str:
    """Return the table of `oreal_jax.metrics.METRICS`."""
    from oreal_jax.metrics import METRICS

    header = ["metric", "unit", "meaning", "in a healthy run"]
    rows = [[f"`{m.name}`", m.unit, m.meaning, m.healthy] for m in METRICS]
    return table(header, rows)


def fill(markdown: str) -> str:
    """Return a page with its tables up to date."""

    def filled(match: re.Match) -> str:
        text = fields_table(match["name"]) if match["name"] else metrics_table()
        return f"{match['begin']}\n\n{text}\n\n<!-- end -->"

    begin = r"<!-- (?:fields: (?P<name>\w+)|metrics) -->"
    inside = r"(?:(?!<!--).)*"  # not beyond the next table if an end is missing
    pattern = rf"(?P<begin>{begin}){inside}<!-- end -->"
    return re.sub(pattern, filled, markdown, flags=re.DOTALL)


if __name__ == "__main__":
    for page in (ROOT / "docs").glob("*.md"):
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
