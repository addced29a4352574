"""The documentation builds as a site that needs no other host."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material builds the site; it is in the docs extra")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    # a link or an anchor that leads nowhere is a warning, and strict
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = [path.read_text(encoding="utf-8") for path in site.rglob("*.html")]
    loaded = {
        found
        for page in pages
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page)
        for found in re.findall(r"(?:src|href)=\"?((?:https?:)?//[^\s\">]+)", tag)
    }
    assert len(pages) > 20 and loaded == set()
    # the search of pages that are opened from the disk
    assert (site / "search" / "search_index.js").is_file()


def test_files_of_the_repository_are_part_of_it(site: Path) -> None:
    quick = (site / "quick-start.html").read_text(encoding="utf-8")
    assert 'href="repository/benchmarks/results/demo.json"' in quick
    demo = (site / "repository" / "benchmarks" / "results" / "demo.json").read_bytes()
    assert demo == (ROOT / "benchmarks" / "results" / "demo.json").read_bytes()
    # a README beside the code is a page, and leads back into docs/
    benchmarks = (site / "repository" / "benchmarks" / "index.html").read_text(encoding="utf-8")
    assert 'href="../../glue.html#before"' in benchmarks


def test_the_reference_is_made(site: Path) -> None:
    made = (site / "reference" / "losses" / "hidden.html").read_text(encoding="utf-8")
    assert "normalized_mse" in made and 'href="../presets.html#tinybert"' in made
    python = (site / "reference" / "python" / "fastkd.html").read_text(encoding="utf-8")
    assert 'id="fastkd.Distiller"' in python


def test_notebooks_are_pages(site: Path) -> None:
    loop = (site / "guide" / "loop.html").read_text(encoding="utf-8")
    # where the text links to the notebook itself
    assert 'href="../notebooks/own-loop.html"' in loop and "own-loop.ipynb" not in loop
    assert "Distiller" in (site / "notebooks" / "own-loop.html").read_text(encoding="utf-8")
