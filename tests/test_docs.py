"""The documentation builds without a broken link, and its tables are complete."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
from printed import ROOT

CONFIGS = (
    "TrainConfig",
    "Packing",
    "Verification",
    "Saving",
    "Evaluation",
    "Optimizer",
)


@pytest.fixture(scope="module")
def hooks():
    """Load the module that makes the tables."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_of_a_config_has_a_text(name, hooks):
    _, _, *rows = hooks.fields_table(name).partition("| field |")[2].splitlines()
    assert rows and not [row for row in rows if row.endswith("|  |")]


def test_the_table_of_fields_is_the_source(hooks):
    table = hooks.fields_table("Saving")
    assert "| `every` | `int` | `10` | Steps between two checkpoints. |" in table
    assert "| `model` | `str` | required | A Hugging Face" in hooks.fields_table(
        "TrainConfig"
    )


@pytest.mark.parametrize("page", ["configuration.md", "metrics.md"])
def test_the_tables_in_the_pages_are_up_to_date(page, hooks):
    """`make docs` updates them."""
    text = (ROOT / "docs" / page).read_text()
    assert len(re.findall("<!-- (fields|metrics)", text)) == text.count("<!-- end -->")
    assert hooks.fill(text) == text


def test_the_documentation_builds(tmp_path):
    pytest.importorskip("mkdocs")
    command = ["-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "metrics" / "index.html").read_text()
    assert "critic/score/mean" in text
    assert "samples_per_prompt" in (tmp_path / "configuration/index.html").read_text()
    lab = (tmp_path / "loss_lab" / "index.html").read_text()
    assert "evaluate_loss" in lab and "data:image/png" in lab


NOTEBOOK = ROOT / "docs" / "loss_lab.ipynb"


def test_the_notebook_is_saved_with_its_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    kinds = [output["output_type"] for cell in code for output in cell["outputs"]]
    assert len(kinds) > 5 and "error" not in kinds
    assert not re.search(r"/(tmp|home|root|work)/|stderr", NOTEBOOK.read_text())


@pytest.mark.slow
def test_the_notebook_runs():
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
