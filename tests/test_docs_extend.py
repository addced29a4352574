"""Pages on losses, layer maps and readers of one's own run as they stand there, top to bottom."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from own_registries import registries_apart
from pages import blocks_of, commands_of
from tiny_models import save_teacher, write_text
from tiny_training import fastkd

from fastkd.data.text import readers

BEFORE = ("PYTHONPATH=.", "fastkd", "distill")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the pages say their folder holds; what they register is gone afterwards."""
    save_teacher(tmp_path / "teacher")
    write_text(tmp_path / "text.txt", documents=60, words=60)
    monkeypatch.chdir(tmp_path)
    # where packed text is cached
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(readers, "_readers", dict(readers._readers))
    with registries_apart(monkeypatch, tmp_path):
        yield tmp_path


@pytest.mark.parametrize(
    ("page", "recipes", "labels"),
    [
        (
            "loss",
            ["lengths", "nearness"],
            {"lengths", "nearness/1-2", "nearness/2-4", "top/2-4"},
        ),
        ("map", ["maps"], {"attention/1-1", "attention/2-3", "hidden/2-*"}),
        ("reader", ["readers"], {"attention/1-2", "attention/2-4", "hidden/1-2", "hidden/2-4"}),
    ],
)
def test_a_page_runs(
    folder: Path,
    page: str,
    recipes: list[str],
    labels: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []
    for block in blocks_of(f"docs/extend/{page}.md"):
        if block.title is not None:
            (folder / block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, block.place, "exec"), {})
        else:
            assert block.language == "sh", block.place
            for *command, recipe in commands_of(block):
                assert tuple(command) == BEFORE, block.place
                assert fastkd("distill", recipe, monkeypatch=monkeypatch) == 0, recipe
                ran.append(Path(recipe).stem)
    assert ran == recipes
    found: set[str] = set()
    for name in recipes:
        summary = json.loads((folder / "runs" / name / "summary.json").read_text())
        assert summary["steps"] == 4 and os.path.isdir(folder / "runs" / name / "student")
        assert all(value > 0 for value in summary["before"]["losses"].values())
        found |= summary["before"]["losses"].keys()
    assert found == labels
