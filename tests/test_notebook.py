"""The notebook of examples/ runs, and shows what it is committed with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tritonloss._dispatch import INTERPRET

if INTERPRET:
    pytest.skip("says the same in the plain run", allow_module_level=True)

nbclient = pytest.importorskip("nbclient")
for needed in ("ipykernel", "matplotlib", "jinja2", "sklearn", "pycocotools"):
    pytest.importorskip(needed)
import nbformat  # noqa: E402  (comes with nbclient)

NOTEBOOK = Path(__file__).parent.parent / "examples" / "choose_a_loss.ipynb"


def shown(notebook) -> list[list[str]]:
    """What each code cell puts out: kinds of outputs."""
    return [
        [output["output_type"] for output in cell["outputs"]]
        for cell in notebook.cells
        if cell["cell_type"] == "code"
    ]


def test_it_runs(monkeypatch):
    monkeypatch.setenv("STEPS", "3")
    committed = nbformat.read(NOTEBOOK, as_version=4)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
    assert shown(notebook) == shown(committed)
    text = "\n".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert "* Easy negatives" in text and "AP50" in text
    table = [line.split() for line in text.splitlines() if line.startswith(("focal", "rank_sort"))]
    assert [len(row) for row in table] == [5, 5]
