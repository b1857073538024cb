"""The notebook of the documents, run in a kernel of its own; it is kept without outputs."""

from pathlib import Path

import pytest

from tests.conftest import ROOT, ray_folder

nbformat = pytest.importorskip("nbformat")
NOTEBOOK = ROOT / "docs" / "first_run.ipynb"

pytestmark = pytest.mark.cluster


def test_the_notebook_runs_from_its_first_cell_to_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("RAY_TMPDIR", ray_folder())
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    book = nbformat.read(NOTEBOOK, 4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in book.cells)
    first = next(cell for cell in book.cells if cell.cell_type == "code")
    assert "training.steps=600" in first.source
    first.source = first.source.replace("training.steps=600", "training.steps=6").replace(
        "tempfile.mkdtemp()", repr(str(tmp_path))
    )
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    said = "".join(str(output.get("text", output.get("data"))) for output in outputs)
    assert "block 2: done, step 6 of 6" in said and "equal on 32 samples" in said
    assert "torch.Size([20, 1, 8, 8])" in said and any("image/png" in output.get("data", {}) for output in outputs)
    assert (tmp_path / "dit-digits" / "merged" / "config.json").exists()
