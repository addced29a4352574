"""An editable install takes the kernels that lie beside it, not their wheel."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsOfTheClone(BuildHookInterface):  # type: ignore[type-arg]
    """Asks for what the kernels need, in place of their wheel.

    `dev-mode-dirs` puts the clone's kernels on the path. Their wheel would hide them there, and
    before a release no index has it.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it builds a wheel, which is `standard` or `editable`."""
        if version != "editable":
            return
        needed = self.metadata.core.dependencies
        needed[:] = [line for line in needed if not line.startswith("fastkd-kernels")]
        kernels = (Path(self.root) / "kernels" / "pyproject.toml").read_text(encoding="utf-8")
        theirs = tomllib.loads(kernels)["project"]["dependencies"]
        build_data["dependencies"] += [line for line in theirs if line not in needed]
