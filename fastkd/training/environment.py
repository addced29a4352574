"""What a run says of where it was made: versions and hardware, and how its files are found again.

It holds no environment variables, no names of users or hosts, and no folder but the one that the
recipe's relative paths start from, see `start_of`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastkd.files.home import home_or_none
from fastkd.limits import cores

_PACKAGES = ("fastkd", "torch", "triton", "transformers", "datasets", "deepspeed", "numpy")


def environment() -> dict[str, Any]:
    """Versions and hardware that a result depends on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "packages": found,
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "cpus": cores(),
        "machine": platform.machine(),
    }


def start_of(run: Path) -> dict[str, Any]:
    """Where a run is started from, in words that `started_from` understands.

    The working folder is named from the run's folder where it is above that one, and from the
    user's home where it is in there; neither says who the user is. Any other is named on the way
    from the run's folder. All are held to a digest, so that a run that was moved does not find
    other files of the same names.
    """
    here = Path.cwd()
    home = home_or_none()
    relative = os.path.relpath(here, run.resolve())
    names = [relative] if set(Path(relative).parts) <= {".."} else []
    if home is not None and home != Path(home.root) and here.is_relative_to(home):
        names.append(str("~" / here.relative_to(home)))
    return {"folder": names or [relative], "folder_digest": _digest(here)}


def started_from(run: Path, said: Mapping[str, Any]) -> Path | None:
    """The folder that `start_of` meant, if it is still there.

    Args:
        run: folder of the run.
        said: what its environment.json holds.
    """
    for name in said["folder"]:
        # which leaves `~` as it is where there is no home
        found = Path(os.path.normpath(run.resolve() / os.path.expanduser(name)))
        if found.is_dir() and said["folder_digest"] == _digest(found):
            return found
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
