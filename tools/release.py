"""See that a tag and what the tree says of its version agree, before anything is built.

    python tools/release.py v0.1.0

Exits with 2 and a line for each place that says otherwise.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def disagreements(tag: str, root: Path = ROOT) -> list[str]:
    """Where the tree says another version than a tag.

    Args:
        tag: `v` and a version.
        root: of the tree.

    Returns:
        A line for each place, with what to write there; none where all is ready.
    """
    if re.fullmatch(r"v\d+\.\d+\.\d+((a|b|rc)\d+)?", tag) is None:
        return [f"{tag}: not a tag of a release; give v and a version, as v0.1.0 or v0.2.0rc1"]
    version = tag[1:]
    found = []
    projects = {
        name: tomllib.loads((root / name).read_text(encoding="utf-8"))["project"]
        for name in ("pyproject.toml", "kernels/pyproject.toml")
    }
    for name, project in projects.items():
        if project["version"] != version:
            found.append(f"{name}: version is {project['version']}; make it {version}")
    asked = f"fastkd-kernels=={version}"
    if asked not in projects["pyproject.toml"]["dependencies"]:
        found.append(f"pyproject.toml: dependencies lack {asked}")
    if f"\nversion: {version}\n" not in (root / "CITATION.cff").read_text(encoding="utf-8"):
        found.append(f"CITATION.cff: no line version: {version}")
    headings = re.findall(r"^## (.*)$", (root / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    if not re.fullmatch(rf"{re.escape(version)} - \d{{4}}-\d\d-\d\d", "".join(headings[1:2])):
        found.append(f"CHANGELOG.md: the heading below Unreleased is not {version} - YYYY-MM-DD")
    return found


def main() -> None:
    """Check the tag of the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/release.py TAG")
    found = disagreements(sys.argv[1])
    print("\n".join(found) or f"{sys.argv[1]}: the tree agrees")
    sys.exit(2 if found else 0)


if __name__ == "__main__":
    main()
