"""Any damage to a checkpoint is found before it is read, and the one before it is continued."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    keys,
    make_recipe,
    read_losses,
    read_weights,
    run_command,
    run_script,
    run_variants,
)

from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.files.sealed import look_at, sealed
from fastkd.training.checkpoint import Checkpoints
from fastkd.training.checkpoint.manifest import Manifest, read_manifest

OLDER, NEWEST = "step-00000002", "step-00000004"
FILES = (
    "manifest.json",
    "parameters_rank_00000.safetensors",
    "random_rank_00000.safetensors",
    "training.safetensors",
)


class _Hostile:
    """Makes a folder where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # dropout makes the random numbers matter
    student = {"layers": 2, "hidden_size": 24, "intermediate_size": 48, "dropout": 0.1}
    return make_recipe(tmp_path_factory.mktemp("damage"), student=student)


def _overrides(run: Path) -> list[str]:
    return keys({"run.output": str(run), "train.checkpoint_every": 2, "train.keep_checkpoints": 2})


@pytest.fixture(scope="module")
def killed(recipe: Path) -> Path:
    """A run that was killed with two checkpoints."""
    run = recipe.parent / "killed"
    moment = "in the last evaluation"
    done = run_script("disturbed_run.py", moment, "0", str(recipe), *_overrides(run))
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    return run


@pytest.fixture
def run(killed: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


def _newest(run: Path) -> tuple[str | None, list[str]]:
    said: list[str] = []
    ranks = Ranks(0, 1, torch.device("cpu"))
    return Checkpoints(run / "checkpoints", ranks, 2).newest(said.append), said


def _signed(folder: Path) -> None:
    """Make the manifest that of what is there now."""
    old = read_manifest(folder)
    files = {name: look_at(folder / name) for name in old.files}
    text = Manifest(old.world_size, old.zero_stage, files).text()
    (folder / "manifest.json").write_text(text)


def _be_hostile(folder: Path, marker: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.write_bytes(pickle.dumps(_Hostile(marker)))


def test_the_newest_whole_one_is_found_without_a_word(run: Path) -> None:
    assert sorted(path.name for path in (run / "checkpoints" / NEWEST).iterdir()) == list(FILES)
    assert _newest(run) == (NEWEST, [])


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_anywhere_is_found(run: Path, name: str) -> None:
    path = run / "checkpoints" / NEWEST / name
    content = path.read_bytes()
    size = len(content)
    places = {0, 1, 7, 8, 9, size // 3, size // 2, size - 2, size - 1}
    for place in sorted({*places, *range(0, size, size // 20)}):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        tag, said = _newest(run)
        assert tag == OLDER, place
        assert len(said) == 1 and f"{NEWEST} is damaged" in said[0] and OLDER in said[0]
        assert name in said[0]


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _replace_by_link(path: Path) -> None:
    moved = path.rename(path.parent.parent / "moved")
    path.symlink_to(moved)


FILE_DAMAGES: dict[str, Callable[[Path], object]] = {
    "is missing": Path.unlink,
    "bytes, expected": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "bytes, expected ": lambda path: path.write_bytes(b""),
    "is no file": _replace_by_folder,
    "is no file ": _replace_by_link,
    "is not of its manifest": lambda path: shutil.copy(path, path.with_name("another")),
}
MANIFESTS = (
    "",
    "{",
    "[]",
    "{}",
    "null",
    '{"format": 3, "files": 3}',
    '{"format": 3, "world_size": 1, "zero_stage": 1, "files": {"a": {"size": 1}}}',
    "[" * 100_000,
    "\0",
)


@pytest.mark.parametrize("said", FILE_DAMAGES)
def test_a_file_that_is_another_is_found(run: Path, said: str) -> None:
    FILE_DAMAGES[said](run / "checkpoints" / NEWEST / FILES[1])
    tag, lines = _newest(run)
    assert tag == OLDER and said.strip() in lines[0]


@pytest.mark.parametrize("text", MANIFESTS)
def test_a_broken_manifest_is_found(run: Path, text: str) -> None:
    (run / "checkpoints" / NEWEST / "manifest.json").write_text(text)
    tag, lines = _newest(run)
    assert tag == OLDER and "manifest.json" in lines[0]


def test_something_in_place_of_a_folder_is_found(run: Path) -> None:
    newest = run / "checkpoints" / NEWEST
    moved = newest.rename(run / "moved")
    newest.symlink_to(moved)
    assert _newest(run)[0] == OLDER
    newest.unlink()
    newest.write_text("")
    tag, lines = _newest(run)
    assert tag == OLDER and "it is no folder" in lines[0]
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("")
    with pytest.raises(UserError, match="can't be looked at"):
        _newest(run)


def test_one_that_was_never_finished_is_no_damage(run: Path) -> None:
    (run / "checkpoints" / NEWEST / "manifest.json").unlink()
    assert _newest(run) == (OLDER, [])
    (run / "checkpoints" / OLDER / "manifest.json").unlink()
    assert _newest(run) == (None, [])


def test_where_none_is_whole_it_is_said(run: Path) -> None:
    for tag in (OLDER, NEWEST):
        (run / "checkpoints" / tag / FILES[2]).unlink()
    with pytest.raises(UserError, match=rf"{NEWEST} is damaged.*{OLDER} is damaged.*none|no check"):
        _newest(run)


def test_one_of_another_format_is_refused(run: Path) -> None:
    path = run / "checkpoints" / NEWEST / "manifest.json"
    tree = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    path.write_text(sealed({**tree, "format": 2}))
    with pytest.raises(UserError, match="of format 2, expected 3: another version of fastkd"):
        _newest(run)


@pytest.mark.parametrize("signed", [False, True])
def test_a_hostile_file_is_refused_before_it_is_read(run: Path, signed: bool) -> None:
    marker, newest = run / "marker", run / "checkpoints" / NEWEST
    _be_hostile(newest, marker)
    if signed:
        _signed(newest)
    tag, lines = _newest(run)
    assert tag == OLDER and NEWEST in lines[0]
    assert not marker.exists()


def test_damaged_runs_end_as_if_nothing_had_happened(recipe: Path, killed: Path) -> None:
    """Also where the damaged one is newer than the next that is written."""
    whole = recipe.parent / "whole"
    runs = {name: recipe.parent / name for name in ("flipped", "hostile")}
    for path in runs.values():
        shutil.copytree(killed, path)
    flipped = runs["flipped"] / "checkpoints" / NEWEST / FILES[3]
    content = bytearray(flipped.read_bytes())
    content[-5] ^= 16
    flipped.write_bytes(content)
    marker = recipe.parent / "marker"
    _be_hostile(runs["hostile"] / "checkpoints" / NEWEST, marker)
    _signed(runs["hostile"] / "checkpoints" / NEWEST)
    overrides = {name: _overrides(path) for name, path in runs.items()}
    # written at step 3: what lies at step 4 is no newer checkpoint of this run
    overrides["flipped"][1:] = keys({"train.checkpoint_every": 3, "train.keep_checkpoints": 1})
    said = run_variants(recipe, [_overrides(whole), *overrides.values()])
    assert not marker.exists()
    for path in runs.values():
        assert f"{path}/checkpoints/{NEWEST} is damaged" in said
        assert f"continuing from {path}/checkpoints/{OLDER}" in said
        mine, theirs = read_weights(path), read_weights(whole)
        assert all(weight.equal(theirs[name]) for name, weight in mine.items())
        assert read_losses(path) == read_losses(whole)
        assert _newest(path) == ("step-00000006", [])
    assert len(list((runs["flipped"] / "checkpoints").glob("step-*"))) == 1


def test_what_can_not_be_continued_is_one_line(recipe: Path, run: Path) -> None:
    """A state of another run, signed: nothing but its content tells."""
    for tag in (OLDER, NEWEST):
        folder = run / "checkpoints" / tag
        shutil.copy(folder / FILES[2], folder / FILES[3])
        _signed(folder)
    done = run_command("distill", str(recipe), *_overrides(run), "--resume")
    assert done.returncode == 2, done.stderr[-2000:]
    assert "can't be continued from it" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
