"""Run a module, and have whatever Python processes it starts forked too: none makes the imports.

Used as `python forked_throughout.py MODULE ...`, from the server of `warm_processes.py`. Processes
of multiprocessing's "spawn" stay interpreters of their own.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

from quick_interpreter import make_quick
from warm_server import become, end

_EXECUTE = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]
_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")


class Forked(subprocess.Popen[Any]):
    """A command of this interpreter is a fork of this process, any other one as ever."""

    def _execute_child(self, *given: Any) -> None:
        asked = _EXECUTE.bind(self, *given).arguments
        if asked["args"][0] != sys.executable:
            super()._execute_child(*given)  # type: ignore[misc]
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _be(asked)
        self._child_created = True
        self._close_pipe_fds(*(asked[name] for name in _PIPES))  # type: ignore[attr-defined]


def _be(asked: dict[str, Any]) -> None:
    """The child, which ends here."""
    for number, name in enumerate(("p2cread", "c2pwrite", "errwrite")):
        if asked[name] != -1:
            os.dup2(asked[name], number)
    if asked["start_new_session"]:
        os.setsid()
    # folders that the parent removes at its own end
    for inherited in [*weakref.finalize._registry]:  # type: ignore[attr-defined]
        inherited.atexit = False
    words = [os.fspath(word) for word in asked["args"][1:]]
    given = {"folder": asked["cwd"], "environment": asked["env"]}
    end(_here(words) | {name: value for name, value in given.items() if value is not None})


def _here(words: list[str]) -> dict[str, Any]:
    """What `become` asks for, as it is in this process."""
    mask = os.umask(0o077)
    os.umask(mask)
    return {"arguments": words, "folder": os.getcwd(), "umask": mask, "environment": {**os.environ}}


if __name__ == "__main__":
    make_quick()
    subprocess.Popen = Forked  # type: ignore[misc]
    sys.path.insert(0, str(Path(__file__).parents[2]))
    become(_here(["-m", *sys.argv[1:]]))
