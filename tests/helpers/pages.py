"""Pages of Markdown that tests read: README, docs/ and the READMEs beside the code.

A block of code may have a title, which is the file that it stands for, and a comment before it that
says what the tests should know:

    <!-- not run: WHY -->       it can't be run or read
    <!-- ranks: 2 -->           `test_distiller_ranks.py` runs it, on so many
    <!-- needs: PACKAGE -->     of an extra, without which it is left out
    <!-- output: FILE -->       what fastkd prints of a committed summary
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from reference import pages

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(
    r"(?:^<!-- (?P<note>[a-z ]+): (?P<said>[^\n]+) -->\n)?"
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?[^\n]*\n(?P<text>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)
_HEADING = re.compile(r"^#{1,6} (.+)$", flags=re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    page: str
    """From the root of the repository."""
    line: int
    heading: str
    """The nearest one above."""
    language: str
    text: str
    title: str | None
    notes: dict[str, str]

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def page_names() -> list[str]:
    """README, all pages of docs/, and the pages beside the code that the site shows."""
    beside = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")
    found = [*(ROOT / name for name in beside), *(ROOT / "docs").rglob("*.md")]
    found += [*(ROOT / "kernels").rglob("README.md"), *(ROOT / "fastkd").rglob("README.md")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def read_page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks_of(name: str) -> list[Block]:
    """The blocks of a page from top to bottom."""
    text, found = read_page(name), []
    for match in _BLOCK.finditer(text):
        above = _HEADING.findall(without_code(text[: match.start()]))
        start = match.start("language")
        found.append(
            Block(
                page=name,
                line=text.count("\n", 0, start) + 1,
                heading=above[-1] if above else "",
                language=match["language"],
                text=match["text"],
                title=match["title"],
                notes={match["note"]: match["said"]} if match["note"] else {},
            )
        )
    return found


def all_blocks(language: str) -> list[Block]:
    """Those of a language on all pages."""
    return [
        block for name in page_names() for block in blocks_of(name) if block.language == language
    ]


def commands_of(block: Block) -> list[list[str]]:
    """Words of each command of a block of `sh`."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def without_code(text: str) -> str:
    """A page's prose: blocks of code have `#` and brackets of their own."""
    return _BLOCK.sub("", text)


def broken_links(name: str, text: str) -> list[str]:
    """Links of a page that lead to no file, no page that is made when the site is, or no heading.

    Args:
        name: where the page stands or would stand, from the root of the repository.
        text: of the page.
    """
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        place, _, anchor = link.partition("#")
        if re.match(r"https?:", place):
            continue
        target = _target(os.path.normpath((ROOT / name).parent / place)) if place else text
        if target is None or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    return broken


def _target(path: str) -> str | None:
    """What a link leads to, empty where it is no page; `None` where nothing is."""
    if path.startswith(f"{ROOT / 'docs' / 'reference'}{os.sep}"):
        return pages().get(os.path.relpath(path, ROOT / "docs"))
    if not os.path.exists(path):
        return None
    return Path(path).read_text(encoding="utf-8") if path.endswith(".md") else ""


def anchors_of(text: str) -> set[str]:
    """What a link may name of a page, as it is made of its headings and of what it documents."""
    words = (
        re.sub(r"[`*]|\]\([^)]*\)|\[", "", head) for head in _HEADING.findall(without_code(text))
    )
    made = {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in words}
    return made | set(re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE))
