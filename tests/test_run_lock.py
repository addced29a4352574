"""Two processes and one folder: the second is told who is there, and a kill lets it in."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import make_recipe, run_command

from fastkd.errors import UserError
from fastkd.files.lock import held

HOLDER = """
import sys, time
from pathlib import Path
from fastkd.files.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """A process that holds a folder."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


def test_the_second_process_is_told_who_is_there_and_a_kill_lets_it_in(tmp_path: Path) -> None:
    recipe, run = make_recipe(tmp_path, train={"steps": 1, "warmup_steps": 0}), tmp_path / "run"
    child = hold(run)
    try:
        done = run_command("distill", str(recipe), "--resume")
        assert done.returncode == 2
        assert done.stderr.strip().splitlines() == [
            f"fastkd: {run} is in use by process {child.pid} on {socket.gethostname()}; wait for "
            "it or stop it, or give another run.output"
        ]
        assert [path.name for path in run.iterdir()] == [".lock"]
    finally:
        child.kill()
        child.wait()
    done = run_command("distill", str(recipe))
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (run / ".lock").exists()


def test_nothing_stays_of_a_folder_that_was_not_claimed(tmp_path: Path) -> None:
    with held(tmp_path / "a" / "b") as locked, held(tmp_path / "a" / "b"):
        assert locked and (tmp_path / "a" / "b" / ".lock").read_text().split()[0] == str(
            os.getpid()
        )
    assert not (tmp_path / "a").exists()
    (tmp_path / "c").mkdir()
    with held(tmp_path / "c"):
        (tmp_path / "c" / "claimed").touch()
    with held(tmp_path / "c"), pytest.raises(RuntimeError), held(tmp_path / "c"):
        raise RuntimeError
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["claimed"]


def test_a_child_that_outlives_its_killed_parent_holds_nothing(tmp_path: Path) -> None:
    """A worker that reads data must not keep the folder of the run that it worked for."""
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        with held(tmp_path / "run"):
            if os.fork() == 0:
                os.write(writing, f"{os.getpid()}\n".encode())
                time.sleep(60)
                os._exit(0)
            time.sleep(60)
    worker = int(os.read(reading, 20))
    try:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        os.kill(worker, 0)
        with held(tmp_path / "run") as locked:
            assert locked
    finally:
        os.kill(worker, signal.SIGKILL)


def test_many_at_once_are_never_inside_together(tmp_path: Path) -> None:
    """Each removes the file as it leaves, which the next one may just have opened."""
    inside, folder = tmp_path / "inside", tmp_path / "run"
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            code = 0
            for _ in range(1000):
                try:
                    with held(folder):
                        try:
                            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                        except FileExistsError:
                            code = 1
                        inside.unlink(missing_ok=True)
                except UserError:
                    pass
            os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with held(tmp_path / "run") as locked:
        assert not locked


@pytest.mark.parametrize("call", ["open", "mkdir"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_fails_is_one_line(
    number: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, above = tmp_path / "runs" / "run", tmp_path / "runs"
    if call == "open":
        above.mkdir()

    def fail(path: object, *_: object) -> int:
        # as of a folder above the one that is asked for
        if call == "mkdir" and path != above:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match=os.strerror(number)) as refused, held(folder):
        pass
    said = str(refused.value)
    if number != errno.ENOSPC:
        failed = above if call == "mkdir" else folder / ".lock"
        assert said.startswith(
            f"{folder} can't be used: writing {failed} failed ({os.strerror(number)})"
        )
        assert said.endswith("see that you may write there, or give another run.output")
