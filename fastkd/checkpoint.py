"""Checkpoints that survive a kill of any rank at any moment.

DeepSpeed writes its files in place and may name a broken checkpoint as the latest. Here a
checkpoint exists once its manifest does, and the manifest is written, in one rename, after every
rank has its files on disk. Rank 0 alone decides which checkpoint is the newest whole one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from fastkd.engine import Ranks
from fastkd.errors import UserError
from fastkd.run_folder import disk_errors, sync_folder, write_whole

_MANIFEST = "manifest.json"


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

    def save(self, engine: Any, step: int, state: dict[str, Any]) -> None:
        """Write engine, random numbers and `state` on all ranks; then drop old checkpoints.

        Raises:
            UserError: the disk is full; earlier checkpoints are untouched.
        """
        tag = f"step-{step:08d}"
        folder = self.folder / tag
        with disk_errors(folder):
            if self.ranks.is_main:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            self.ranks.barrier()
            engine.save_checkpoint(
                str(self.folder), tag=tag, client_state={"fastkd": state}, save_latest=False
            )
            torch.save(_random_state(self.ranks), folder / self._random_file())
            _sync_files(folder)
            self.ranks.barrier()
            if self.ranks.is_main:
                self._finish(folder, engine.zero_optimization_stage())
        self.ranks.barrier()

    def newest(self) -> str | None:
        """The newest whole checkpoint, chosen by rank 0, or `None`."""

        def choose() -> str | None:
            whole = self._whole()
            return whole[-1].name if whole else None

        return self.ranks.from_main(choose)

    def load(self, engine: Any, tag: str) -> dict[str, Any]:
        """Restore engine and random numbers, and return the `state` that was saved with them.

        Raises:
            UserError: the checkpoint was written by another number of ranks.
        """
        manifest = json.loads((self.folder / tag / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["world_size"] != self.ranks.world_size:
            raise UserError(
                f"{self.folder / tag} was written by {manifest['world_size']} ranks, this is a run "
                f"of {self.ranks.world_size}; continue with {manifest['world_size']}"
            )
        path, client_state = engine.load_checkpoint(str(self.folder), tag=tag)
        if path is None:
            raise UserError(f"{self.folder / tag}: DeepSpeed found nothing to load there")
        saved = torch.load(self.folder / tag / self._random_file(), weights_only=True)
        _restore_random_state(saved, self.ranks)
        state: dict[str, Any] = client_state["fastkd"]
        return state

    def _finish(self, folder: Path, stage: int) -> None:
        files = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
        manifest = {"files": files, "world_size": self.ranks.world_size, "zero_stage": stage}
        write_whole(folder / _MANIFEST, json.dumps(manifest, indent=2) + "\n")
        sync_folder(self.folder)
        write_whole(self.folder / "latest", folder.name)
        whole = self._whole()
        stale = {p for p in self.folder.glob("step-*") if p not in whole[-self.keep :]}
        for path in stale:
            # without its manifest a checkpoint that is half deleted no longer counts
            (path / _MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)

    def _whole(self) -> list[Path]:
        return [path for path in sorted(self.folder.glob("step-*")) if _is_whole(path)]

    def _random_file(self) -> str:
        return f"random_rank_{self.ranks.rank:05d}.pt"


def _is_whole(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in manifest["files"].items()
    )


def _sync_files(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def _random_state(ranks: Ranks) -> dict[str, Any]:
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return state


def _restore_random_state(state: dict[str, Any], ranks: Ranks) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if ranks.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], ranks.device)
