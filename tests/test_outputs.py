"""Places that commands write to are tried before the work, and named as they were given."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from tiny_training import fastkd

from fastkd.errors import UserError
from fastkd.files.disk import check_place


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "nowhere", "--output"),
        ("init", "nowhere", "nothing.txt", "--output"),
    ],
)
def test_a_place_that_can_not_be_written_is_named_before_the_work(
    command: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for place in ("gone/n.json", "file/n.json", "link/n.json", "link", "n" * 300):
        assert fastkd(*command, place, monkeypatch=monkeypatch) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"fastkd: --output {place} can't be made (")
        assert str(os.getpid()) not in said and said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
    assert (tmp_path / "link").is_symlink()


def test_no_folder_to_work_in_or_for_temporary_files_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "removed").mkdir()
    with monkeypatch.context() as inside:
        inside.chdir(tmp_path / "removed")
        (tmp_path / "removed").rmdir()
        assert fastkd("evaluate", "nowhere", monkeypatch=inside) == 2
    said = capsys.readouterr().err
    assert "the working folder is not to be found" in said and said.count("\n") == 1
    gone = str(tmp_path / "gone")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [gone])
    assert fastkd("evaluate", "nowhere", monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert gone in said and "set TMPDIR to a folder" in said and said.count("\n") == 1


def test_folders_above_a_place_may_be_made_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    check_place(tmp_path / "a" / "b", "--output", above=True)
    with pytest.raises(UserError, match=r"x .*file/a/b can't be made \(Not a directory\)"):
        check_place(tmp_path / "file" / "a" / "b", "x", above=True)
    (tmp_path / "link").symlink_to("link")
    for place in ("link", "link/a", "link/a/b"):
        with pytest.raises(UserError, match=rf"x .*{place} can't be made \("):
            check_place(tmp_path / place, "x", above=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
    output = str(tmp_path / "file" / "a")
    models = ("nowhere", "nothing", "--data", "text")
    assert fastkd("inspect", *models, "--output", output, monkeypatch=monkeypatch) == 2
    assert f"--output {output}/similarity.csv can't be made" in capsys.readouterr().err
