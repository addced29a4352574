"""A run's folder: begun again after a kill at any moment, nothing of others' touched, no link."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import make_recipe

from fastkd.cli import doctor
from fastkd.errors import UserError
from fastkd.files.disk import disk_errors, settle
from fastkd.files.lock import held
from fastkd.recipe import AnyRecipe, load_any_recipe
from fastkd.training.run_folder import RunFolder


@pytest.fixture
def recipe(tmp_path: Path) -> AnyRecipe:
    return load_any_recipe(make_recipe(tmp_path))


def start(recipe: AnyRecipe, *, resume: bool) -> None:
    """What a run does to its folder before its first step."""
    run = RunFolder(recipe.run.output)
    run.check_ours()
    with held(run.path):
        assert run.check(recipe, resume=resume) is None
        run.tidy()
        run.create(recipe)


def killed_at(number: int, act: Callable[[], None]) -> bool:
    """Whether a child was killed before its so-many-th opening, renaming, making or removing."""
    child = os.fork()
    if child == 0:
        left = number

        def die(event: str, _arguments: Any) -> None:
            nonlocal left
            if event in ("open", "os.rename", "os.mkdir", "os.remove", "fcntl.flock"):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
        act()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


def test_a_start_that_is_killed_anywhere_is_begun_again(recipe: AnyRecipe) -> None:
    start_here = RunFolder(recipe.run.output)
    moments = without = 0
    while killed_at(moments + 1, lambda: start(recipe, resume=True)):
        moments += 1
        # a plain start will do where the recipe doesn't stand there yet
        without += not start_here.holds_run
        start(recipe, resume=start_here.holds_run)
        found = {path.name for path in start_here.path.iterdir()}
        assert found == {"recipe.yaml", "environment.json"}
        assert load_any_recipe(start_here.recipe) == recipe
        assert start_here.started_in == Path.cwd()
        for path in start_here.path.iterdir():
            path.unlink()
        start_here.path.rmdir()
    assert moments > 8 and 3 < without < moments


def test_what_runs_that_were_killed_left_is_removed_and_nothing_else(recipe: AnyRecipe) -> None:
    start(recipe, resume=False)
    run = RunFolder(recipe.run.output)
    checkpoint = run.checkpoints / "step-00000004"
    checkpoint.mkdir(parents=True)
    ours = [
        run.path / ".recipe.yaml.17",
        run.path / ".summary.json.4242",
        run.path / ".report.html.1",
        run.path / ".projections.safetensors.5",
        run.checkpoints / ".latest.99",
        checkpoint / ".manifest.json.3",
        run.path / ".student.12" / "model.safetensors",
    ]
    theirs = [
        run.path / ".summary.json.bak",
        run.path / ".notes.123",
        run.path / "thesis.txt",
        run.checkpoints / ".mine.5",
        run.path / "student" / ".config.json.7",
    ]
    for path in (*ours, *theirs):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    elsewhere = run.path.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    (run.path / ".student.13").symlink_to(elsewhere)
    start(recipe, resume=True)
    assert not any(path.exists() for path in ours)
    assert not (run.path / ".student.13").is_symlink() and not (run.path / ".student.12").exists()
    assert all(path.exists() for path in (*theirs, elsewhere / "precious"))


BEGINNINGS: dict[str, Callable[[Path], object]] = {
    "half a recipe": lambda run: (run / ".recipe.yaml.4242").write_text("teach"),
    "the lock of a killed process": lambda run: (run / ".lock").write_text("1 host\n"),
    "a tracker's folder": lambda run: (
        (run / "tensorboard").mkdir(),
        (run / "tensorboard" / "events.out.tfevents.1.host.2.0").write_text(""),
    ),
    "a stage's folder": lambda run: (
        (run / "stage-1").mkdir(),
        (run / "stage-1" / ".lock").write_text(""),
    ),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_runs_own_beginnings_are_no_bar(name: str, recipe: AnyRecipe) -> None:
    run = RunFolder(recipe.run.output)
    run.path.mkdir()
    BEGINNINGS[name](run.path)
    start(recipe, resume=False)
    assert run.holds_run and json.loads(run.environment.read_text())["cpus"]
    assert not (run.path / ".lock").exists() and not (run.path / ".recipe.yaml.4242").exists()


FOREIGN: dict[str, Callable[[Path], object]] = {
    "a file": lambda run: (run / "thesis.txt").write_text("x"),
    "an environment without a recipe": lambda run: (run / "environment.json").write_text("{}"),
    "a tracker's folder with more in it": lambda run: (
        (run / "tensorboard").mkdir(),
        (run / "tensorboard" / "notes").write_text(""),
    ),
    "a file that is named like a temporary one": lambda run: (run / ".thesis.txt.5").write_text(""),
    "a link": lambda run: (run / ".lock").symlink_to(run / "nowhere"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_anything_else_is_left_as_it_is(name: str, recipe: AnyRecipe) -> None:
    run = RunFolder(recipe.run.output)
    run.path.mkdir()
    FOREIGN[name](run.path)
    before = sorted(run.path.rglob("*"))
    for resume in (False, True):
        with pytest.raises(UserError, match="is not empty and holds no run"):
            start(recipe, resume=resume)
    assert sorted(run.path.rglob("*")) == before


def _link(path: Path) -> None:
    target = path.parent / "target"
    target.mkdir()
    path.symlink_to(target)


KINDS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a file as student": ("student", lambda p: p.write_text(""), "is a file, expected a folder"),
    "a link as student": ("student", _link, "is a link, expected a folder"),
    "a file as checkpoints": ("checkpoints", lambda p: p.write_text(""), "is a file, expected"),
    "a link as checkpoints": ("checkpoints", _link, "is a link, expected a folder"),
    "a link as a checkpoint": ("checkpoints/step-00000002", _link, "is a link, expected a fo"),
    "a file as a checkpoint": (
        "checkpoints/step-00000002",
        lambda p: p.write_text(""),
        "is a file, expected a folder",
    ),
    "a folder as metrics": ("metrics.jsonl", lambda p: p.mkdir(), "is a folder, expected a file"),
    "a link as metrics": ("metrics.jsonl", _link, "is a link, expected a file"),
    "a pipe as a summary": ("summary.json", lambda p: os.mkfifo(p), "is a special file, expect"),
    "a link as a stage": ("stage-1", _link, "is a link, expected a folder"),
}


@pytest.mark.parametrize("name", KINDS)
def test_files_and_links_where_folders_should_be_are_found_at_the_start(
    name: str, recipe: AnyRecipe
) -> None:
    start(recipe, resume=False)
    place, make, expected = KINDS[name]
    path = RunFolder(recipe.run.output).path / place
    path.parent.mkdir(exist_ok=True)
    make(path)
    with pytest.raises(UserError, match=expected) as refused:
        start(recipe, resume=True)
    assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)


OUTPUTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a file": ("run", lambda p: p.write_text("x"), "Not a directory"),
    "a link to nothing": ("run", lambda p: p.symlink_to("nowhere"), "No such file or dir"),
    "below a file": ("run/1/2", lambda p: p.write_text("x"), "Not a directory"),
    # as where a disk isn't mounted
    "below a link to nothing": ("run/1/2", lambda p: p.symlink_to("nowhere"), "a link to nothing"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_of_another_kind_is_one_line(name: str, tmp_path: Path) -> None:
    output, make, expected = OUTPUTS[name]
    make(tmp_path / "run")
    recipe = load_any_recipe(make_recipe(tmp_path, run={"output": str(tmp_path / output)}))
    with pytest.raises(UserError, match=expected) as refused:
        start(recipe, resume=False)
    assert "run.output" in str(refused.value)


def test_an_output_that_may_not_be_looked_at_is_one_line(
    recipe: AnyRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may look anywhere, so the refusal is put in its place."""
    run = RunFolder(recipe.run.output)
    run.path.mkdir()

    def refuse(path: Path) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=r"run can't be used \(Permission denied\)"):
        start(recipe, resume=False)


def test_doctor_says_that_an_output_can_not_be_made(recipe: AnyRecipe, tmp_path: Path) -> None:
    output = tmp_path / "corpus.txt" / "run"
    with pytest.raises(UserError, match=r"^run\.output .*run can't be made \(Not a directory\)"):
        doctor(tmp_path / "recipe.yaml", [f"run.output={output}"])


def test_errors_of_other_places_and_kinds_pass(tmp_path: Path) -> None:
    for error in (FileNotFoundError(2, "x", "/elsewhere"), ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)), disk_errors(tmp_path):
            raise error


def _caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


FULL = [
    OSError(errno.EDQUOT, "x", "/elsewhere/cache"),
    OSError(errno.EFBIG, "x"),
    shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'")]),
    # tokenizers, safetensors, torch and whoever wraps them
    Exception("No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0"),
    _caused(ValueError("can't write"), OSError(errno.ENOSPC, "x")),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_is_known_in_whatever_form_it_comes(
    error: BaseException, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="writing failed") as refused, disk_errors(tmp_path):
        raise error
    where = "/elsewhere/cache" if error is FULL[0] else str(tmp_path)
    assert str(refused.value).startswith(f"{where}: ")
    space = "limit of a file's size" if error is FULL[1] else "free some space"
    assert f"{space}" in str(refused.value)


def test_permissions_are_those_of_the_umask(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    files = [tmp_path / "one", tmp_path / "deep" / "two"]
    for path in files:
        path.touch(mode=0o600)
    before = os.umask(0o027)
    try:
        settle(tmp_path)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in files] == [0o640, 0o640]


def test_what_a_run_says_of_its_surroundings_names_no_user(
    recipe: AnyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "alice"
    (home / "project").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.chdir(home / "project")
    outputs = [home / "project" / "runs" / "a", home / "b", tmp_path / "c"]
    for output in outputs:
        run = RunFolder(output)
        run.create(recipe)
        text = run.environment.read_text()
        assert not any(word in text for word in ("alice", "hf_secret", "home", str(tmp_path)))
        assert run.started_in == Path.cwd()
    assert json.loads(RunFolder(outputs[0]).environment.read_text())["folder"][0] == "../.."
    # moved, it is found by the home that it was started from, and nothing else passes for it
    moved = tmp_path / "elsewhere" / "deep" / "a"
    moved.parent.mkdir(parents=True)
    outputs[0].rename(moved)
    assert RunFolder(moved).started_in == Path.cwd()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder(moved).started_in is None
