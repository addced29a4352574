"""A release is refused in lines that say where the tree has another version than the tag."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tools.release import ROOT, disagreements

TREE = {
    "pyproject.toml": '[project]\nversion = "1.2.3"\ndependencies = ["fastkd-kernels==1.2.3"]\n',
    "kernels/pyproject.toml": '[project]\nversion = "1.2.3"\n',
    "CITATION.cff": "title: fastkd\nversion: 1.2.3\n",
    "CHANGELOG.md": "## Unreleased\n\n## 1.2.3 - 2027-01-31\n\n## 1.2.2 - 2027-01-01\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files that say a version, all the same."""
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_a_tree_that_agrees_is_ready(tree: Path) -> None:
    assert disagreements("v1.2.3", tree) == []


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("pyproject.toml", '"1.2.3"', '"1.2.2"', "version is 1.2.2; make it 1.2.3"),
        ("kernels/pyproject.toml", "1.2.3", "1.3.0", "version is 1.3.0; make it 1.2.3"),
        ("pyproject.toml", "kernels==", "kernels>=", "dependencies lack fastkd-kernels==1.2.3"),
        ("CITATION.cff", "1.2.3", "1.2.3rc1", "no line version: 1.2.3"),
        ("CHANGELOG.md", " - 2027-01-31", "", "is not 1.2.3 - YYYY-MM-DD"),
        ("CHANGELOG.md", "## Unreleased\n", "", "is not 1.2.3 - YYYY-MM-DD"),
    ],
)
def test_each_place_is_named(tree: Path, name: str, old: str, new: str, said: str) -> None:
    (tree / name).write_text(TREE[name].replace(old, new), encoding="utf-8")
    (line,) = disagreements("v1.2.3", tree)
    assert line.startswith(f"{name}: ") and line.endswith(said)


def test_what_is_no_version_is_no_tag(tree: Path) -> None:
    for tag in ("1.2.3", "v1.2", "v1.2.3-final"):
        (line,) = disagreements(tag, tree)
        assert line.startswith(f"{tag}: not a tag of a release")


def test_the_tree_lacks_a_date_at_most() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = disagreements(f"v{project['version']}")
    assert all(re.match(r"CHANGELOG\.md: the heading", line) for line in found)
