"""Sees what a process changes on a disk: openings for writing, renamings, makings and removals.

Only what Python does is seen; what libraries in C++ and Rust write is not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

# where the arguments of an event hold the folder that a path is relative to
_FOLDER = {"os.rename": 2, "os.mkdir": 2, "os.remove": 1, "os.rmdir": 1, "os.chmod": 2}


def on_change(see: Callable[[str, str], None]) -> None:
    """Call with the event and the absolute path before each change, which fails if that raises.

    There is no way back: meant for processes of their own.
    """

    def hook(event: str, arguments: Any) -> None:
        if event not in ("open", *_FOLDER) or not _is_path(arguments[0]):
            return
        if event != "open" or _writes(arguments):
            see(event, _absolute(event, arguments))

    sys.addaudithook(hook)


def on_sync(see: Callable[[str, str], None]) -> None:
    """Likewise before each fsync, which no audit event tells of."""
    original = os.fsync

    def fsync(handle: Any) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        see("os.fsync", os.readlink(f"/proc/self/fd/{number}"))
        original(handle)

    os.fsync = fsync


def _is_path(value: object) -> bool:
    return isinstance(value, str | bytes | os.PathLike)


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) or bool(mode and set(mode) & set("wax+"))


def _absolute(event: str, arguments: tuple[Any, ...]) -> str:
    path = os.fsdecode(arguments[0])
    handle = arguments[_FOLDER[event]] if event in _FOLDER else -1
    # shutil.rmtree goes from handle to handle
    if not os.path.isabs(path) and handle >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{handle}"), path)
    return os.path.abspath(path)
