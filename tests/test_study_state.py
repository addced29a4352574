"""A study that is packed and laid out elsewhere has its runs, goes on, and reports the same."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from study_files import TUNING, ended, run, write_study

from fastkd.errors import UserError
from tools.study_state import pack, unpack

pytestmark = pytest.mark.usefixtures("undrawn")

TOOL = Path(__file__).parents[1] / "tools" / "study_state.py"


def test_a_study_goes_on_from_its_state(tmp_path: Path, notes: Path) -> None:
    out = tmp_path / "out"
    step = {"command": "finetune", "recipe": TUNING, "per_seed": True}
    run(write_study(tmp_path, shared={"teacher": step}))
    runs = {file.name: file.read_text() for file in (out / "report").glob("*.csv")}
    archive = tmp_path / "state.tar.xz"
    assert pack(out, archive) == 4
    first = archive.read_bytes()
    pack(out, archive)
    assert archive.read_bytes() == first
    shutil.rmtree(out)
    notes.unlink()
    assert unpack(archive, out) == 4
    assert not list(out.rglob("student"))
    run(write_study(tmp_path, shared={"teacher": step}))
    assert {file.name: file.read_text() for file in (out / "report").glob("*.csv")} == runs
    assert not notes.exists()
    # also what its teachers were
    other = {**step, "overrides": {"train.steps": 9}}
    with pytest.raises(UserError, match=r"teacher \(seed 0\) was made with another"):
        run(write_study(tmp_path, shared={"teacher": other}))
    # a seed more, whose teacher alone is made
    run(write_study(tmp_path, shared={"teacher": step}, seeds=3))
    assert set(ended(notes)) == {
        "shared/teacher/seed-2",
        "mapping=uniform/seed-2",
        "mapping=last/seed-2",
    }


@pytest.mark.usefixtures("notes")
def test_a_running_study_is_packed_without_what_is_unfinished(tmp_path: Path) -> None:
    run(write_study(tmp_path))
    out = tmp_path / "out"
    unfinished = next((out / "runs").rglob("run/summary.json"))
    unfinished.unlink()
    archive = tmp_path / "state.tar.xz"
    assert pack(out, archive) == 3
    shutil.rmtree(out)
    assert unpack(archive, out) == 3
    assert not (out / unfinished.parents[1].relative_to(out)).exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pack", "nowhere", "state.tar.xz"], "nowhere holds no study.db"),
        (["unpack", "state.tar.xz", "."], ". is there already; move it away"),
        (["unpack", "text", "out"], "not an lzma file"),
    ],
)
def test_what_is_no_study_is_refused(tmp_path: Path, words: list[str], expected: str) -> None:
    (tmp_path / "text").write_text("text")
    said = subprocess.run(
        [sys.executable, TOOL, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert said.returncode == 2 and expected in said.stderr and said.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]
