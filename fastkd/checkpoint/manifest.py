"""What says that a checkpoint is whole: sizes and digests of its files, and of the list itself.

Digests find damage: bytes that a disk, a copy or a hand has changed. They are no signature: who can
write the files can write the list. That such a file does nothing when it is read is held by what it
is read as (`states`).
"""

from __future__ import annotations

import hashlib
import json
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastkd.checkpoint.states import NotAState, Written, check_state, file_sha256
from fastkd.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 2
"""Raised when checkpoints of before can't be continued; 1 were DeepSpeed's own, in pickles."""
# more than a manifest of ten thousand ranks
_LIMIT = 1 << 26


class Damaged(ValueError):
    """A checkpoint that is not what was written; says how."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is made of."""

    world_size: int
    zero_stage: int
    files: dict[str, Written]
    """By name; beside these and the manifest there are none."""

    def text(self) -> str:
        """The content of its file."""
        body = {"format": FORMAT, **asdict(self)}
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return json.dumps({**body, "sha256": digest}, indent=2, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, whole.

    Raises:
        Damaged: it is not as it was written.
        UserError: a version of before wrote it.
    """
    path = folder / MANIFEST
    try:
        if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > _LIMIT:
            raise Damaged(f"its {MANIFEST} is another file")
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"its {MANIFEST} can't be read") from error
    if isinstance(tree, dict) and "format" not in tree and {"files", "world_size"} <= tree.keys():
        raise UserError(
            f"{folder} was written by an earlier fastkd, as pickles, which may run code when they "
            "are read; continue with the version that wrote it, or start again in another "
            "run.output"
        )
    try:
        manifest = _parsed(tree)
    except (LookupError, TypeError, AttributeError) as error:
        raise Damaged(f"its {MANIFEST} is no list of files") from error
    # all of it: a byte that changes nothing else is a changed byte
    if manifest.text() != text:
        raise Damaged(f"its {MANIFEST} is not what was written")
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """See that a folder holds the files of its manifest and no other, by name, kind and size.

    Raises:
        Damaged: it doesn't.
    """
    # a name that starts with a dot is never read
    found = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {MANIFEST}
    for name in sorted(found ^ manifest.files.keys()):
        where = "is missing" if name in manifest.files else f"is not of its {MANIFEST}"
        raise Damaged(f"{name} {where}")
    for name, written in manifest.files.items():
        status = (folder / name).lstat()
        if not stat.S_ISREG(status.st_mode):
            raise Damaged(f"{name} is no file")
        if status.st_size != written.size:
            raise Damaged(f"{name} has {status.st_size:,} bytes, expected {written.size:,}")


def check_content(path: Path, written: Written) -> None:
    """See that a file is the one that was written.

    Raises:
        Damaged: it isn't.
    """
    try:
        if file_sha256(path) != written.sha256:
            raise Damaged(f"{path.name} is not what was written: its sha256 differs")
        check_state(path)
    except NotAState as error:
        raise Damaged(f"{path.name} is no file of a checkpoint ({error})") from error
    except OSError as error:
        raise Damaged(f"{path.name} can't be read ({error.strerror})") from error


def _parsed(tree: Any) -> Manifest:
    files = {name: Written(**written) for name, written in tree["files"].items()}
    return Manifest(tree["world_size"], tree["zero_stage"], files)
