"""The process of one stage: `python -m benchmarks.gpu.record MODULE JSON DEVICE [CASE...]`.

Calls `run` of the module. What that notes is in the JSON at once, so it stays when the process is
ended.
"""

import resource
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu.stages import write


class Record:
    """What a stage has found.

    Args:
        path: of the JSON.
        device: "cuda", or "cpu" for a dry run with tiny shapes.
        cases: starts of the names that are wanted; all unless given.
    """

    def __init__(self, path: Path, device: str, cases: list[str]) -> None:
        self.path, self.device, self.cases = path, device, cases
        self._found: dict[str, Any] = {}
        self._problems: list[str] = []
        self._skipped: list[str] = []

    def note(self, **found: Any) -> None:
        """Something that was found, by its name."""
        self._found.update(found)
        self._write()

    def problem(self, said: str) -> None:
        """Something that fails the stage, which goes on."""
        self._problems.append(said)
        self._write()

    def skip(self, reason: str) -> None:
        """Something that was left out, which is no failure."""
        self._skipped.append(reason)
        self._write()

    def attempt(self, name: str, function: Callable[[], Any]) -> Any:
        """What a function gives; None where it fails, which is a problem of that name."""
        try:
            return function()
        # whatever a case fails with, the others are run
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            self.problem(f"{name}: {type(error).__name__}: {lines[0][:300]}")
            return None

    def _write(self) -> None:
        parts = {"found": self._found, "problems": self._problems, "skipped": self._skipped}
        write(self.path, parts)


def main() -> None:
    module, path, device, *cases = sys.argv[1:]
    # what is ended on timeout would leave all its memory in a file
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import_module(module).run(Record(Path(path), device, cases))


if __name__ == "__main__":
    main()
