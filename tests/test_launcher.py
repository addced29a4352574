"""What is not begun by several ranks, and processes that are to be none."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from study_files import FAKE, run, write_study

from fastkd import cli
from fastkd.study.forks import Fork
from fastkd.study.locks import Claim

LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    "command",
    [
        "init teacher text.txt",
        "report run",
        "push run owner/name",
        "export run --onnx",
        "study study.yaml",
        "inspect teacher student --data text.txt",
        "doctor recipe.yaml --gpu h100",
        "fields train.steps",
    ],
)
def test_what_one_process_does_is_refused_to_ranks(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["fastkd", *command.split()])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    assert raised.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fastkd: fastkd {command.split()[0]}") and said.count("\n") == 1
    assert "is done by one process, but there are 2 ranks; start it without torchrun" in said
    assert not os.listdir(tmp_path)


def test_a_scheduler_that_starts_one_process_is_none_of_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fastkd", "fields", "train.steps"])
    for names in ({"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "8"}):
        with monkeypatch.context() as changed:
            changed.delenv("RANK", raising=False)
            for name, value in names.items():
                changed.setenv(name, value)
            with pytest.raises(SystemExit) as raised:
                cli.main()
        assert not raised.value.code
        assert "train.steps" in capsys.readouterr().out


def test_runs_of_a_study_are_no_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would meet at the port of the process that starts the study, and train together."""
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "29500"}
    for name, value in {**launched, "FAKE_JOURNAL": str(tmp_path / "journal")}.items():
        monkeypatch.setenv(name, value)
    program = tmp_path / "program.py"
    program.write_text(
        "import os, runpy, sys\n"
        f"if {set(launched)} & set(os.environ):\n"
        "    sys.exit('it is a rank')\n"
        f"runpy.run_path({FAKE[1]!r}, run_name='__main__')\n"
    )
    assert run(write_study(tmp_path), program=(sys.executable, str(program))).is_file()


def test_a_fork_is_no_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    claim = Claim.take(tmp_path / "claim")
    assert claim is not None
    child = Fork(["fields", "train.steps"], tmp_path / "log.txt", {}, claim.handle)
    child.wait(120)
    claim.release()
    assert child.returncode == 0, (tmp_path / "log.txt").read_text()
