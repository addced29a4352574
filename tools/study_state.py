"""Pack what a study has come to, without a model, so that it can be gone on with elsewhere.

    python tools/study_state.py pack runs/study-maps maps.tar.xz
    python tools/study_state.py unpack maps.tar.xz runs/study-maps

An archive has the queue (`study.db`), the study file, of every finished run its recipe, summary and
predictions, and what shared steps were made with; no teacher, which a study makes again when a run
wants it. What is unfinished is
left out. The same state makes the same members. A folder that is there is not unpacked into.
"""

from __future__ import annotations

import argparse
import io
import sqlite3
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

QUEUE = "study.db"
DIGEST = "digest.txt"
KEPT = ("recipe.yaml", "run/summary.json", "run/predictions.npz")


def pack(study: Path, archive: Path) -> int:
    """Write a study's state.

    Args:
        study: its output folder; it may be running.
        archive: what is written, in whole or not at all.

    Returns:
        How many finished runs are in it.

    Raises:
        ValueError: the folder has no study.
    """
    if not (study / QUEUE).is_file():
        raise ValueError(f"{study} holds no {QUEUE}; give the output folder of a study")
    runs = sorted(path.parents[1] for path in (study / "runs").rglob("run/summary.json"))
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:xz") as file:
        for name, content in _members(study, runs):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    archive.parent.mkdir(parents=True, exist_ok=True)
    archive.write_bytes(whole.getvalue())
    return len(runs)


def unpack(archive: Path, study: Path) -> int:
    """Lay a packed state out.

    Args:
        archive: of `pack`.
        study: folder that is made.

    Returns:
        How many finished runs it has.

    Raises:
        ValueError: the folder is there, or the archive is none of a study.
    """
    if study.exists():
        raise ValueError(f"{study} is there already; move it away, or give another folder")
    with tarfile.open(archive, "r:xz") as file:
        names = file.getnames()
        if QUEUE not in names:
            raise ValueError(f"{archive} has no {QUEUE}; give an archive of a study's state")
        file.extractall(study, filter="data")
    return sum(name.endswith("run/summary.json") for name in names)


def _members(study: Path, runs: list[Path]) -> Iterator[tuple[str, bytes]]:
    yield QUEUE, _queue(study / QUEUE)
    yield "study.yaml", (study / "study.yaml").read_bytes()
    # what a shared step was made with: made again of another recipe it would be another one
    for noted in sorted((study / "shared").rglob(DIGEST)):
        if (noted.parent / "run" / "summary.json").is_file():
            yield noted.relative_to(study).as_posix(), noted.read_bytes()
    # alike next to alike, which packs best
    for kept in KEPT:
        for run in runs:
            if (run / kept).is_file():
                yield (run / kept).relative_to(study).as_posix(), (run / kept).read_bytes()


def _queue(path: Path) -> bytes:
    """The queue between two of its transactions."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / QUEUE
        source, target = sqlite3.connect(f"file:{path}?mode=ro", uri=True), sqlite3.connect(copy)
        source.backup(target)
        source.close()
        target.close()
        return copy.read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=["pack", "unpack"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args()
    work = pack if given.command == "pack" else unpack
    try:
        runs = work(given.source, given.target)
    except (ValueError, OSError, tarfile.TarError) as error:
        sys.exit(print(f"study_state: {error}", file=sys.stderr) or 2)
    print(f"{given.target}: {runs} finished runs")


if __name__ == "__main__":
    main()
