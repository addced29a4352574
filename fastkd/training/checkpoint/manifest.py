"""What says that a checkpoint is whole: sizes and digests of its files, and of the list itself.

The digests find damage. That a file which somebody has put there, with its digest, does nothing
when it is read is held by what it is read as (`states`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from fastkd.errors import UserError
from fastkd.files.sealed import (
    Damaged,
    Written,
    check_bytes,
    check_size,
    read_sealed,
    sealed,
)
from fastkd.training.checkpoint.states import NotAState, check_state

MANIFEST = "manifest.json"
FORMAT = 3
"""Raised when checkpoints of before can't be continued."""


_GO_ON = "continue with the version that wrote it, or start again in another run.output"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is made of."""

    world_size: int
    zero_stage: int
    files: dict[str, Written]
    """By name; beside these and the manifest there are none."""

    def text(self) -> str:
        """The content of its file."""
        return sealed({"format": FORMAT, **asdict(self)})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, whole.

    Raises:
        Damaged: it is not as it was written.
        UserError: another version wrote it.
    """
    tree = read_sealed(folder / MANIFEST)
    if tree.get("format") != FORMAT:
        raise UserError(
            f"{folder} is a checkpoint of format {tree.get('format')}, expected {FORMAT}: another "
            f"version of fastkd wrote it; {_GO_ON}"
        )
    try:
        files = {name: Written(**written) for name, written in tree["files"].items()}
        return Manifest(tree["world_size"], tree["zero_stage"], files)
    except (LookupError, TypeError, AttributeError) as error:
        raise Damaged(f"{MANIFEST} is no list of files") from error


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
        check_size(folder / name, written)


def check_content(path: Path, written: Written) -> None:
    """See that a file is the one that was written, and that it holds a state.

    Raises:
        Damaged: it isn't.
    """
    check_bytes(path, written)
    try:
        check_state(path)
    except NotAState as error:
        raise Damaged(f"{path.name} is no file of a checkpoint ({error})") from error
