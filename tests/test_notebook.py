"""The notebook is kept without results, and names only commands and files that exist; CI runs it."""

from __future__ import annotations

import re

import nbformat

from tests.conftest import ROOT

NOTEBOOK = ROOT / "notebooks/carracing.ipynb"


def test_the_notebook_is_valid_clean_and_up_to_date() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    text = "\n".join(cell.source for cell in notebook.cells)
    commands = set(re.findall(r"-m pipeline\.(\w+)", text))
    assert {"train", "evaluate", "record_videos", "demo", "report"} <= commands
    assert all((ROOT / f"pipeline/{name}.py").exists() for name in commands)
    assert all((ROOT / name).exists() for name in re.findall(r"configs/\w+\.yaml|requirements\.txt", text))
    shells = [cell.source for cell in cells if "-m pipeline" in cell.source]
    assert all(source.startswith("%%bash\n") for source in shells), "unlike !, it stops at a command that fails"
