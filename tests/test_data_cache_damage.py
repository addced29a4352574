"""A damaged cache is built again with a line, whatever the damage; killed builds leave nothing."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import shutil
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_tokenizer, write_text
from tiny_training import write_task
from transformers import PreTrainedTokenizerBase

from fastkd.data.tasks import (
    EncodedExamples,
    encode_examples,
    read_examples,
)
from fastkd.data.tasks.prepare import task_of
from fastkd.data.text import cache, prepare_corpus
from fastkd.data.text.cache import (
    STALE_SECONDS,
    is_complete,
    new_folder,
    read_meta,
    write_meta,
)
from fastkd.data.text.settings import TextSettings
from fastkd.errors import UserError
from fastkd.recipe import TaskData


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer(VOCABULARY)


@pytest.fixture
def data(tmp_path: Path) -> TextSettings:
    text = write_text(tmp_path / "text.txt", documents=60, words=60)
    settings: dict[str, Any] = {"cache": str(tmp_path / "cache"), "block_size": 16, "workers": 1}
    return TextSettings(train=(str(text),), heldout_fraction=0.2, **settings)


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def _be_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _be_link(path: Path) -> None:
    path.symlink_to(path.rename(path.parent.parent / "moved"))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "first byte": lambda path: _flip(path, 0),
    "eighth byte": lambda path: _flip(path, 8),
    "middle": lambda path: _flip(path, path.stat().st_size // 2),
    "last byte": lambda path: _flip(path, -1),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "gone": Path.unlink,
    "folder": _be_folder,
    "link": _be_link,
}


@pytest.mark.parametrize("name", ["train.arrow", "heldout.arrow", "meta.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_blocks_are_built_again(
    data: TextSettings,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = prepare_corpus(data, tokenizer, progress=False)
    expected = first.stream(4, 0).next_batch()
    folder = Path(data.cache) / first.fingerprint
    DAMAGES[damage](folder / name)
    with caplog.at_level(logging.WARNING):
        again = prepare_corpus(data, tokenizer, progress=False)
    assert f"data.cache: {folder} is damaged ({name}" in caplog.text
    assert "it is built again" in caplog.text
    assert torch.equal(again.stream(4, 0).next_batch(), expected)
    assert torch.equal(again.heldout, first.heldout)
    others = {path.name for path in Path(data.cache).iterdir()} - {"moved"}
    assert others == {first.fingerprint}
    caplog.clear()
    prepare_corpus(data, tokenizer, progress=False)
    assert not caplog.text


def _encode(folder: Path, tokenizer: PreTrainedTokenizerBase) -> EncodedExamples:
    columns = {"texts": "text", "label": "label"}
    tree = {"name": "tiny", "source": str(folder / "task"), "columns": columns}
    section = TaskData.model_validate({**tree, "labels": ["no", "yes"]})
    examples = read_examples(task_of(section), section.source, "train", str(folder / "cache"))
    options: dict[str, Any] = {"max_length": 32, "token_types": True, "progress": False}
    return encode_examples(examples, tokenizer, cache=folder / "cache", **options)


@pytest.mark.parametrize("name", ["tokens", "offsets", "labels", "types"])
def test_damaged_examples_are_built_again(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_task(tmp_path / "task")
    first = _encode(tmp_path, tokenizer)
    batch = first.batch([0, 5, 9])
    path = tmp_path / "cache" / first.fingerprint / f"{name}.bin"
    for damage in ("first byte", "middle", "last byte", "cut", "longer", "gone"):
        DAMAGES[damage](path)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            again = _encode(tmp_path, tokenizer).batch([0, 5, 9])
        assert f"task.cache: {path.parent} is damaged ({path.name}" in caplog.text
        assert all(torch.equal(again[key], batch[key]) for key in batch)


def test_what_stands_in_place_of_the_folder_makes_room(
    data: TextSettings, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = Path(data.cache) / prepare_corpus(data, tokenizer, progress=False).fingerprint
    moved = shutil.move(folder, tmp_path / "moved")
    folder.symlink_to(moved)
    prepare_corpus(data, tokenizer, progress=False)
    assert not folder.is_symlink() and (Path(moved) / "meta.json").is_file()
    shutil.rmtree(folder)
    folder.write_text("a file")
    prepare_corpus(data, tokenizer, progress=False)
    assert folder.is_dir()
    assert list(Path(data.cache).iterdir()) == [folder]


def test_a_cache_of_an_earlier_version_is_built_again(
    data: TextSettings, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = Path(data.cache) / prepare_corpus(data, tokenizer, progress=False).fingerprint
    meta = folder / "meta.json"
    meta.write_text('{"train_blocks": 3}')
    with pytest.raises(UserError, match="is damaged"):
        read_meta(folder)
    prepare_corpus(data, tokenizer, progress=False)
    assert read_meta(folder)["train_blocks"] > 3


def test_a_damaged_folder_of_a_containers_image_is_built_again(
    data: TextSettings, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(data.cache) / prepare_corpus(data, tokenizer, progress=False).fingerprint
    (folder / "meta.json").write_text("{}")
    rename = os.rename

    def of_an_overlay(source: Path, target: Path) -> None:
        # its lower layers let no folder move, one that was made since may
        if source == folder:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", of_an_overlay)
    prepare_corpus(data, tokenizer, progress=False)
    assert read_meta(folder)["train_blocks"] > 3
    assert list(Path(data.cache).iterdir()) == [folder]


def test_bytes_are_read_once_a_process(
    data: TextSettings, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_corpus(data, tokenizer, progress=False)
    original, read = cache.check_bytes, []
    monkeypatch.setattr(cache, "check_bytes", lambda p, w: (read.append(p.name), original(p, w)))
    prepare_corpus(data, tokenizer, progress=False)
    assert sorted(read) == ["heldout.arrow", "train.arrow"]
    prepare_corpus(data, tokenizer, progress=False)
    # another rank looks at sizes
    prepare_corpus(data, tokenizer, build=False, progress=False)
    assert len(read) == 2


def test_a_killed_build_is_removed_and_a_running_one_is_not(tmp_path: Path) -> None:
    def build() -> None:
        with new_folder(tmp_path / "killed") as folder:
            (folder / "train.arrow").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=build)
    process.start()
    process.join(60)
    (leftover,) = tmp_path.iterdir()
    assert process.exitcode == -signal.SIGKILL and (leftover / "train.arrow").exists()
    with new_folder(tmp_path / "key") as running:
        assert not is_complete(tmp_path / "key", build=False)
        assert leftover.exists()
        assert not is_complete(tmp_path / "key")
        assert list(tmp_path.iterdir()) == [running]
        write_meta(running, {"n": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_folder_is_open_to_whom_the_umask_leaves_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o2770)
    before = os.umask(0o002)
    try:
        with new_folder(tmp_path / "cache" / "key") as folder:
            write_meta(folder, {"n": 1})
    finally:
        os.umask(before)
    paths = ("cache", "cache/key", "cache/key/meta.json")
    modes = [stat.S_IMODE((tmp_path / path).stat().st_mode) for path in paths]
    assert [oct(mode) for mode in modes] == ["0o2775", "0o2775", "0o664"]


def as_another(work: Callable[[], None], place: Path) -> int | None:
    """Exit status of what is done, in a folder, by one who is not root."""

    def dropped() -> None:
        # which leads into it, whatever the folders above allow
        os.chdir(place)
        if os.geteuid() == 0:
            os.setuid(65534)
        work()

    process = multiprocessing.get_context("fork").Process(target=dropped)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("name", ["meta.json", "train.arrow", "."])
def test_what_may_not_be_read_is_not_called_damaged(tmp_path: Path, name: str) -> None:
    tmp_path.chmod(0o777)
    with new_folder(tmp_path / "key") as folder:
        (folder / "train.arrow").write_bytes(b"blocks")
        write_meta(folder, {"n": 1})
    (tmp_path / "key" / name).chmod(0)

    def use() -> None:
        whose = r"key.* may not be read \(Permission denied\): .*key.* is owned by .*mode is 0"
        with pytest.raises(UserError, match=rf"^data\.cache: {whose}; .*another folder"):
            is_complete(Path("key"))

    assert as_another(use, tmp_path) == 0
    (tmp_path / "key").chmod(0o755)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["key", "meta.json", "train.arrow"]


def test_what_is_damaged_and_may_not_be_replaced_is_said_first(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with new_folder(tmp_path / "key") as folder:
        write_meta(folder, {"n": 1})
    _flip(tmp_path / "key" / "meta.json", 0)
    (tmp_path / "key").chmod(0o555)

    def use() -> None:
        with pytest.raises(UserError, match=r"key is damaged .*may not replace it"):
            is_complete(Path("key"))

    assert as_another(use, tmp_path) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_leftovers_of_other_machines_go_when_they_are_old(tmp_path: Path) -> None:
    old, new = tmp_path / ".building-0123abcd-x", tmp_path / ".building-0123abcd-y"
    for folder in (old, new):
        folder.mkdir()
        (folder / "train.arrow").write_bytes(b"half")
    then = time.time() - STALE_SECONDS - 60
    for path in (old / "train.arrow", old):
        os.utime(path, (then, then))
    assert not is_complete(tmp_path / "key")
    assert list(tmp_path.iterdir()) == [new]
