"""Lay out the kernels as Hugging Face's Hub serves them.

    python tools/kernel_hub.py dist/hub --repo-id OWNER/fastkd-kernels

Writes `build/torch-<backend>/` for every backend of `kernels/build.toml`: the files of the package,
and `metadata.json` with their digests and an id, which is the name of the loaded module and of its
ops. The card becomes `README.md`. This is what kernel-builder makes of a kernel without compiled
code, which needs Nix and a folder `torch-ext` to make it. The format is that of "Kernel
requirements" in the documentation of `kernels`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tomllib
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).parents[1] / "kernels"


def lay_out(folder: Path, repo_id: str) -> None:
    """Write the repository.

    Args:
        folder: for it; one that is not there yet, or empty.
        repo_id: its name on the Hub, `OWNER/NAME`, for the card.
    """
    general = tomllib.loads((KERNELS / "build.toml").read_text(encoding="utf-8"))["general"]
    package = KERNELS / general["name"].replace("-", "_")
    files = {
        str(path.relative_to(package)): path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    for backend in general["backends"]:
        variant = folder / "build" / f"torch-{backend}"
        for name, content in files.items():
            (variant / name).parent.mkdir(parents=True, exist_ok=True)
            (variant / name).write_bytes(content)
        text = json.dumps(_metadata(general, backend, package.name, files), indent=2)
        (variant / "metadata.json").write_text(text + "\n", encoding="utf-8")
    shutil.copy(KERNELS / "build.toml", folder)
    shutil.copy(KERNELS / "LICENSE", folder)
    card = (KERNELS / "CARD.md").read_text(encoding="utf-8")
    for name, value in {"repo_id": repo_id, "version": general["version"]}.items():
        card = card.replace(f"{{{{ {name} }}}}", str(value))
    (folder / "README.md").write_text(card, encoding="utf-8")


def _metadata(
    general: dict[str, Any], backend: str, package: str, files: dict[str, bytes]
) -> dict[str, Any]:
    digests = {name: sha256(content).digest() for name, content in files.items()}
    # of the content: two versions in one process have ops of different names
    whole = sha256(b"".join(name.encode() + digest for name, digest in digests.items()))
    return {
        "name": general["name"],
        "id": f"_{package}_{backend}_{whole.hexdigest()[:7]}",
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: b64encode(digest).decode() for name, digest in digests.items()},
        },
    }


def main() -> None:
    """Lay out into the folder of the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the repository; not there yet, or empty")
    parser.add_argument("--repo-id", required=True, help="its name on the Hub, OWNER/NAME")
    arguments = parser.parse_args()
    folder = arguments.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        print(f"{folder} is not an empty folder; name another, or remove it", file=sys.stderr)
        sys.exit(2)
    lay_out(folder, arguments.repo_id)
    print(f"{folder}: a repository of type kernel")


if __name__ == "__main__":
    main()
