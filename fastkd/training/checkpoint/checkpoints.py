"""Checkpoints that survive a kill of any rank at any moment, and damage to any of their bytes.

DeepSpeed writes its files in place and may name a broken checkpoint as the latest. Here a
checkpoint exists once its manifest does, and the manifest is written, in one rename, after every
rank has its files on disk. It is checked against that manifest before anything of it is read, and
all ranks continue from the same one: the newest that is whole.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd.distributed import Ranks
from fastkd.errors import FOREIGN_ERRORS, UserError, one_line
from fastkd.files.disk import (
    disk_errors,
    sweep,
    sync_folder,
    write_whole,
)
from fastkd.files.sealed import Damaged, Written
from fastkd.training.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    check_content,
    check_files,
    read_manifest,
)
from fastkd.training.checkpoint.named_state import Parameters, load_named_state, named_state
from fastkd.training.checkpoint.states import (
    SUFFIX,
    Tree,
    opened_state,
    read_state,
    write_state,
)

_NAME = re.compile(r"step-\d{8,}")
_PARAMETERS, _RANDOM = "parameters", "random"
_TRAINING = f"training{SUFFIX}"


class Checkpoints:
    """The checkpoints of one run, newest last."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int) -> None:
        """Look after a folder.

        Args:
            folder: of all checkpoints of the run.
            ranks: this process among all.
            keep: whole checkpoints that stay.
        """
        self.folder = folder
        self.ranks = ranks
        self.keep = keep
        self._damaged: set[str] = set()

    def save(self, engine: Any, step: int, state: dict[str, Any]) -> None:
        """Write engine, random numbers and `state` on all ranks; then drop old checkpoints.

        Raises:
            UserError: the disk of any rank is full; earlier checkpoints are untouched.
        """
        tag = f"step-{step:08d}"
        folder = self.folder / tag

        def make() -> None:
            with disk_errors(folder):
                _remove(folder)
                folder.mkdir(parents=True)

        def write() -> dict[str, Written]:
            with disk_errors(folder):
                written = {name: write_state(folder / name, tree) for name, tree in trees.items()}
                sync_folder(folder)
            return written

        def finish() -> None:
            with disk_errors(folder):
                self._finish(folder, engine.zero_optimization_stage(), everything)

        self.ranks.from_main(make)
        training = {**named_state(engine, self.ranks), "run": state}
        trees = {
            _of_rank(_PARAMETERS, self.ranks.rank): training.pop("parameters"),
            _of_rank(_RANDOM, self.ranks.rank): _random_state(self.ranks),
        }
        if self.ranks.is_main:
            trees[_TRAINING] = training
        # nothing is whole before every rank has its files on disk
        everything = self.ranks.gather(self.ranks.on_each(write))
        self.ranks.from_main(finish)

    def newest(self, say: Callable[[str], None] = lambda text: None) -> str | None:
        """The newest whole checkpoint, or `None` where none was ever finished; all ranks agree.

        Args:
            say: told of newer ones that are damaged and passed over.

        Raises:
            UserError: there are checkpoints, and all are damaged or of an earlier version.
        """
        faults: list[str] = []
        for name in self.ranks.from_main(self._finished):
            fault = self._fault(self.folder / name)
            if fault is None:
                if faults:
                    say(f"warning: {'; '.join(faults)}; the one before is {name}")
                return name
            self._damaged.add(name)
            faults.append(f"{self.folder / name} is damaged: {fault}")
        if faults:
            raise UserError(
                f"{'; '.join(faults)}; no checkpoint is whole: put one back, or start again in "
                "another run.output"
            )
        return None

    def load(
        self, engine: Any, tag: str, seed: int, say: Callable[[str], None] = lambda text: None
    ) -> dict[str, Any]:
        """Restore engine and random numbers, and return the `state` that was saved with them.

        Args:
            engine: to restore; its stage and the number of ranks may be others than those of then.
            tag: from `newest`, which has checked the checkpoint.
            seed: of random numbers where there were fewer ranks.
            say: told where the number of ranks is another.

        Raises:
            UserError: the checkpoint doesn't fit.
        """
        folder = self.folder / tag
        manifest = self.ranks.from_main(lambda: read_manifest(folder))
        each, world_size = self.ranks.on_each, manifest.world_size
        try:
            training = each(partial(read_state, folder / _TRAINING))
            with ExitStack() as stack:
                opened = _opened_parameters(folder, world_size)
                parameters = each(partial(stack.enter_context, opened))
                load_named_state(engine, {**training, "parameters": parameters}, self.ranks)
            each(partial(self._restore_random_state, folder, world_size, seed))
            state: dict[str, Any] = training["run"]
        except FOREIGN_ERRORS as error:
            raise UserError(
                f"{folder}: this run can't be continued from it ({one_line(error)}); see that it "
                "is a checkpoint of this run"
            ) from error
        if world_size != self.ranks.world_size:
            say(
                f"{tag} was written by {_ranks(world_size)}, this is a run of "
                f"{_ranks(self.ranks.world_size)}: the steps read the same data, dropout draws "
                "other numbers"
            )
        return state

    def _restore_random_state(self, folder: Path, world_size: int, seed: int) -> None:
        """Go on with the random numbers of this rank, or start those of one that is new."""
        ranks, saved = self.ranks, {}
        if ranks.rank < world_size:
            saved = read_state(folder / _of_rank(_RANDOM, ranks.rank))
        own = hashlib.sha256(f"{seed} {folder.name} {ranks.rank}".encode()).digest()
        fresh = random.Random(int.from_bytes(own[:8]) >> 1)
        random.setstate(saved.get("python", fresh.getstate()))
        if "torch" in saved:
            torch.set_rng_state(saved["torch"])
        else:
            torch.default_generator.manual_seed(fresh.getrandbits(63))
        if ranks.device.type != "cuda":
            return
        if "cuda" in saved:
            torch.cuda.set_rng_state(saved["cuda"], ranks.device)
        else:
            torch.cuda.manual_seed(fresh.getrandbits(63))

    def _finish(self, folder: Path, stage: int, written: list[dict[str, Written]]) -> None:
        files = {name: file for mine in written for name, file in mine.items()}
        manifest = Manifest(self.ranks.world_size, stage, files)
        write_whole(folder / MANIFEST, manifest.text())
        sync_folder(self.folder)
        write_whole(self.folder / "latest", folder.name)
        self._damaged.discard(folder.name)
        # what is newer than this one was passed over when the run was continued
        older = [name for name in self._entries() if _step(name) < _step(folder.name)]
        whole = [name for name in older if name not in self._damaged and self._has_files(name)]
        for name in set(self._entries()) - {folder.name, *whole[: self.keep - 1]}:
            _remove(self.folder / name)

    def _entries(self) -> list[str]:
        """Names of all checkpoints, newest first, whole or not."""
        try:
            names = [path.name for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(
                f"{self.folder} can't be looked at ({error.strerror}); expected the folder of the "
                "run's checkpoints: put it back"
            ) from error
        return sorted(names, key=_step, reverse=True)

    def _finished(self) -> list[str]:
        """Names of all checkpoints, newest first, but those that were never finished."""
        # of a process that was killed
        sweep(self.folder, "latest")
        return [
            name
            for name in self._entries()
            if not _is_folder(self.folder / name) or os.path.lexists(self.folder / name / MANIFEST)
        ]

    def _has_files(self, name: str) -> bool:
        return self._structure(self.folder / name)[0] is None

    def _structure(self, folder: Path) -> tuple[str | None, dict[str, Written]]:
        """What is wrong with a checkpoint as far as one can see without reading it, and its
        files."""
        try:
            if not _is_folder(folder):
                raise Damaged("it is no folder")
            manifest = read_manifest(folder)
            check_files(folder, manifest)
        except Damaged as error:
            return str(error), {}
        except OSError as error:
            return f"it can't be looked at ({error.strerror})", {}
        return None, manifest.files

    def _fault(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, the same on all ranks; each reads its share."""
        fault, files = self.ranks.from_main(lambda: self._structure(folder))

        def look() -> list[str]:
            found = []
            for name in sorted(files)[self.ranks.rank :: self.ranks.world_size]:
                try:
                    check_content(folder / name, files[name])
                except Damaged as error:
                    found.append(str(error))
            return found

        damaged = [text for texts in self.ranks.gather(self.ranks.on_each(look)) for text in texts]
        return damaged[0] if fault is None and damaged else fault


@contextmanager
def _opened_parameters(folder: Path, world_size: int) -> Iterator[Parameters]:
    """What all ranks of then have written of the parameters; each tensor is read when it is asked
    for."""
    with ExitStack() as stack:
        found: dict[str, _Stored] = {}
        for rank in range(world_size):
            tree = stack.enter_context(opened_state(folder / _of_rank(_PARAMETERS, rank)))
            found |= {name: _Stored(readers) for name, readers in tree.items()}
        yield found


class _Stored(Mapping[str, Tensor]):
    """The tensors of a parameter, in a file."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._readers = dict(readers)

    def __getitem__(self, key: str) -> Tensor:
        return self._readers[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def _of_rank(kind: str, rank: int) -> str:
    return f"{kind}_rank_{rank:05d}{SUFFIX}"


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number > 1)}"


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _remove(path: Path) -> None:
    """Remove a checkpoint, or what stands in its place; nothing that a link points to."""
    if not _is_folder(path):
        path.unlink(missing_ok=True)
        return
    # without its manifest a checkpoint that is half deleted no longer counts
    manifest = path / MANIFEST
    if not _is_folder(manifest):
        manifest.unlink(missing_ok=True)
    shutil.rmtree(path)


def _random_state(ranks: Ranks) -> Tree:
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return state
