"""A hook of MkDocs: files of the repository that the documentation links to are part of the site.

A page links to a result, a recipe or a README by its place in the repository, which works wherever
the file itself is read. The hook copies what is linked to below `repository/`, follows the links of
the READMEs among them, and turns such links round. Other pages of the repository may stand in the
navigation as `repository/PATH`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file of the repository that a page leads to."""
    waiting = [ROOT / place.removeprefix("repository/") for place in _navigation(config.nav)]
    for file in files.documentation_pages():
        waiting += _outside(_place(file), file.content_string)
    while waiting:
        path = waiting.pop()
        uri = _uri(path)
        if files.get_file_from_path(uri) is not None:
            continue
        inclusion = InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, uri, abs_src_path=str(path), inclusion=inclusion))
        if path.suffix == ".md":
            waiting += _outside(path, path.read_text(encoding="utf-8"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that leave or enter `docs/` to where their files are in the site."""
    source = _place(page.file)
    here = os.path.dirname(page.file.src_uri)

    def turned(link: re.Match[str]) -> str:
        target = (source.parent / link[1]).resolve()
        both_inside = source.is_relative_to(DOCS) and target.is_relative_to(DOCS)
        if both_inside or files.get_file_from_path(_uri(target)) is None:
            return link[0]
        return os.path.relpath(_uri(target), here or ".") + (link[2] or "")

    return _LINK.sub(turned, markdown)


def _place(file: File) -> Path:
    """Where a page's links start: its own file, or where one that is generated would be."""
    return Path(file.abs_src_path) if file.abs_src_path is not None else DOCS / file.src_uri


def _outside(page: Path, text: str) -> Iterator[Path]:
    """Files of the repository outside of docs/ that a page leads to."""
    for link in _LINK.finditer(text):
        target = (page.parent / link[1]).resolve()
        inside = target.is_relative_to(ROOT) and not target.is_relative_to(DOCS)
        if inside and target.is_file():
            yield target


def _uri(path: Path) -> str:
    """Where a file is in the site; above the repository, where nothing is, by its own path."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    if path.is_relative_to(ROOT):
        return f"repository/{path.relative_to(ROOT).as_posix()}"
    return path.as_posix()


def _navigation(entries: object) -> Iterator[str]:
    """Pages of the repository that the navigation names."""
    if isinstance(entries, str):
        if entries.startswith("repository/"):
            yield entries
    elif isinstance(entries, dict):
        yield from _navigation([*entries.values()])
    elif isinstance(entries, list):
        for entry in entries:
            yield from _navigation(entry)
