"""A process reads a file for its digest once, and a file that changed again."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import make_recipe

from fastkd.api import distill
from fastkd.files import sealed
from fastkd.files.sealed import file_sha256

# longer than the ticks of a disk's clock
TICK = 0.05


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose bytes were read."""
    made, digest = [], hashlib.file_digest

    def counted(file: Any, *given: Any) -> Any:
        made.append(file.name.name if isinstance(file.name, Path) else Path(file.name).name)
        return digest(file, *given)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return made


def right(path: Path) -> bool:
    return file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_that_lies_still_is_read_once(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealed, "_SETTLED_SECONDS", -1e9)
    path = tmp_path / "building" / "a"
    path.parent.mkdir()
    path.write_bytes(b"one")
    assert right(path) and right(path)
    # what was built takes its name
    path.parent.rename(tmp_path / "built")
    path = tmp_path / "built" / "a"
    assert right(path) and reads == ["a"]
    time.sleep(TICK)
    before = path.stat().st_mtime_ns
    path.write_bytes(b"two")
    os.utime(path, ns=(before, before))
    assert right(path) and reads == ["a", "a"]
    path.unlink()
    path.write_bytes(b"six")
    assert right(path)


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path, reads: list[str]) -> None:
    path = tmp_path / "a"
    for number in range(200):
        # within one tick of the clock, and of one size
        path.write_bytes(b"%03d" % number)
        assert right(path)
    assert len(reads) == 200


def test_a_run_reads_the_weights_of_its_teacher_once(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealed, "_SETTLED_SECONDS", -1e9)
    cache = {"cache": "exact", "cache_folder": str(tmp_path / "states")}
    path = make_recipe(tmp_path, teacher=cache, train={"steps": 3})
    distill(path)
    stored = [name for name in reads if name.endswith(".bin")]
    assert reads.count("model.safetensors") == 1
    assert stored and len(stored) == len({*(tmp_path / "states").rglob("*.bin")})
