"""`fastkd report`: one finished run, or several beside each other."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from tiny_runs import make_recipe

import fastkd
from fastkd.cli import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and what another with a higher rate and one loss fewer would have left."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = make_recipe(folder, student={"layers": 2})
    fastkd.distill(recipe, {"train.steps": 3, "run.output": str(folder / "one" / "run")})
    shutil.copytree(folder / "one", folder / "two")
    path = folder / "two" / "run" / "recipe.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["train"]["learning_rate"] = 0.5
    tree["run"]["output"] = "elsewhere"
    del tree["losses"]["embedding"]
    path.write_text(yaml.safe_dump(tree))
    path = path.with_name("summary.json")
    summary = json.loads(path.read_text())
    del summary["after"]["losses"]["embedding/0-0"]
    summary["after"]["losses"]["hidden/1-2"] = 77.125
    path.write_text(json.dumps({**summary, "steps": 12345}))
    return folder


def said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *folders: Path
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["fastkd", "report", *map(str, folders)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def cells(table: str, first: str) -> list[str]:
    """The numbers of the row that begins so."""
    line = next(line for line in table.splitlines() if first in line)
    return [cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")][1:]


def test_runs_stand_beside_each_other(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = said(monkeypatch, capsys, runs / "one" / "run", runs / "two" / "run")
    assert code == 0
    # both folders are called run
    head = next(line for line in out.splitlines() if "one/run" in line)
    assert "two/run" in head
    before = json.loads((runs / "one" / "run" / "summary.json").read_text())
    assert cells(out, "train.learning_rate")[1] == "0.5"
    assert cells(out, "losses.embedding.weight")[1] == "-"
    losses = before["after"]["losses"]
    assert cells(out, "embedding/0-0") == [f"{losses['embedding/0-0']:.4g}", "-"]
    assert cells(out, "hidden/1-2") == [f"{losses['hidden/1-2']:.4g}", "77.12"]
    assert len(set(cells(out, "sentence embeddings, cosine"))) == 1 and "weighted" not in out
    assert cells(out, "steps") == ["3", "12,345"]
    assert "elsewhere" not in out and "train.batch_size" not in out


def test_many_runs_are_told_apart_in_a_log(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"tinybert-losses-seed-{number}" for number in range(6)]
    for name in names:
        shutil.copytree(runs / "one" / "run", tmp_path / name)
    code, out, _ = said(monkeypatch, capsys, *(tmp_path / name for name in names))
    heads = [line for line in out.splitlines() if line.startswith("┃")]
    assert code == 0 and heads
    assert all([cell.strip() for cell in head.split("┃")[2:-1]] == names for head in heads)


def test_other_data_and_models_of_the_same_name_are_told(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = runs / "one" / "run", tmp_path / "other"
    _, same, _ = said(monkeypatch, capsys, one, runs / "two" / "run")
    assert "data (train)" not in same and "files of" not in same
    shutil.copytree(one, other)
    summary = json.loads((one / "summary.json").read_text())
    was = summary["data_digests"]["train"]
    summary["data_digests"] = {"train": "0" * 64}
    (other / "summary.json").write_text(json.dumps(summary))
    models = json.loads((one / "models.json").read_text())
    models["teacher.model"]["config.json"] = "0" * 64
    (other / "models.json").write_text(json.dumps(models))
    _, out, _ = said(monkeypatch, capsys, one, other)
    assert cells(out, "data (train)") == [was[:12], "0" * 12]
    assert len(set(cells(out, "files of teacher.model"))) == 2
    # of a run that says nothing nothing differs
    del summary["data_digests"]
    (other / "summary.json").write_text(json.dumps(summary))
    (other / "models.json").unlink()
    _, out, _ = said(monkeypatch, capsys, one, other)
    assert "data (train)" not in out and "files of" not in out


def test_a_run_alone_is_told_as_at_its_end(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = said(monkeypatch, capsys, runs / "one" / "run")
    assert code == 0 and "before" in out and "trained on: " in out


def test_what_is_no_finished_run_is_refused_in_one_line(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = runs / "one" / "run"
    os.symlink(one, runs / "again")
    for other, expected in (
        (runs / "nowhere", "nowhere holds no finished run; give the folder of one"),
        (runs / "again", "a run is named twice; give each once"),
    ):
        code, out, err = said(monkeypatch, capsys, one, other)
        assert code == 2 and not out and expected in err and err.count("\n") == 1
