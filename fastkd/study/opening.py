"""What a storage must be before a study is written to it: nothing, or the same study."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import optuna
from optuna.trial import TrialState

from fastkd.errors import UserError
from fastkd.files.disk import is_temporary, sweep, sync_folder, temporary_of

# how long a writer waits for another one's transaction
BUSY_SECONDS = 120


class StorageErrors(AbstractContextManager[None, None]):
    """Turns a database that another process holds, or that can't be written, into one line; a
    class, because it looks at what passes: Optuna wraps some errors of SQLAlchemy and not others.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, UserError):
            return
        cause = error
        while cause is not None and not isinstance(cause, sqlite3.OperationalError):
            cause = cause.__cause__
        if cause is None:
            return
        if _is_busy(cause):
            raise UserError(
                f"{self.path} was held by another process for {BUSY_SECONDS} s ({cause}); let that "
                "go on or end it, then run the same command again"
            ) from error
        raise UserError(
            f"{self.path}: reading or writing failed ({cause}); see that you may write there and "
            "that the disk has room, then run the same command again"
        ) from error


def _is_busy(error: sqlite3.Error) -> bool:
    return "database is locked" in str(error)


def check_file(path: Path, output: Path) -> None:
    """Refuse a file or folder that is somebody else's, before anything is written to it."""
    if not path.exists():
        # another study may have made what it borrows from this one
        ours = {"study.lock", "shared", "claims"}
        others = [
            p.name
            for p in output.iterdir()
            if p.name not in ours and not is_temporary(p, path.name)
        ]
        if others:
            raise UserError(
                f"{output} is not empty and holds no study ({others[0]}); give another output"
            )
        return
    try:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS
        )
        try:
            rows = connection.execute("select name from sqlite_master").fetchall()
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        if _is_busy(error):
            raise
        raise UserError(
            f"{path} can't be read as a storage ({error}); move it away, or give another output"
        ) from error
    tables = {name for (name,) in rows}
    if tables and not {"studies", "trials"} <= tables:
        raise UserError(f"{path} is a database of something else; give the study another output")


def open_file(path: Path) -> optuna.storages.RDBStorage:
    """The storage in a file, which gets its name once it has all tables; for who has the study's
    lock."""
    if not path.exists():
        sweep(path.parent, path.name)
        # a folder: SQLite writes beside its file
        folder = temporary_of(path)
        folder.mkdir()
        _storage(folder / path.name).engine.dispose()
        (folder / path.name).rename(path)
        folder.rmdir()
        sync_folder(path.parent)
    return _storage(path)


def _storage(path: Path) -> optuna.storages.RDBStorage:
    # text of a URL would be read again: Optuna looks for {}, SQLAlchemy for ? and %
    connect = partial(sqlite3.connect, path, timeout=BUSY_SECONDS, check_same_thread=False)
    return optuna.storages.RDBStorage("sqlite:///study.db", engine_kwargs={"creator": connect})


def check_same(
    study: optuna.Study,
    path: Path,
    fixed: Mapping[str, str],
    direction: str,
    search: optuna.Study | None,
) -> bool:
    """Refuse what must not change; whether the metric did, which summaries tell as well.

    A search is led by the values that it found, so its metric stays once it has some.
    """
    before: dict[str, str] = study.user_attrs.get("fixed", {})
    if not before:
        study.set_user_attr("fixed", dict(fixed))
        return False
    led = search is not None and bool(
        search.get_trials(False, (TrialState.COMPLETE, TrialState.PRUNED))
    )
    turned = study.direction.name.lower() != direction
    for key in sorted(before.keys() | fixed.keys()):
        free = key == "metric" and not led and not turned
        if before.get(key) != fixed.get(key) and not free:
            raise UserError(
                f"{path} was made by a study file whose {key} was another; put it back, or give "
                "the study another output"
            )
    return before.get("metric") != fixed.get("metric")
