"""Tables of a result, and their place in the README of the benchmarks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers.groups import FASTKD, PEERS

BEGIN, END = "<!-- tables of make peers -->", "<!-- end of its tables -->"
TITLES = {"layers": "Losses inside", "logits": "Logits", "embeddings": "Embeddings"}


def tables(found: dict[str, Any]) -> str:
    """A result in Markdown."""
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    lines = [
        f"{found['processor']}, {found['threads']} threads, {found['dtype']}, "
        f"torch {found['torch']}, {packages}.",
        "",
    ]
    for name, group in found["groups"].items():
        lines += [f"**{TITLES[name]}**: {group['what']}.", ""]
        for size in dict.fromkeys(case["size"] for case in group["cases"]):
            cases = [case for case in group["cases"] if case["size"] == size]
            lines += [*_table(size, cases), ""]
    lines += ["| not in the tables | |", "|---|---|", *_absent(found)]
    return "\n".join(lines) + "\n"


def _table(size: str, cases: list[dict[str, Any]]) -> Iterator[str]:
    heads = [f"{case['batch']} x {case['tokens']} | MB" for case in cases]
    yield f"| {size} | | {' | '.join(heads)} |"
    yield "|---|---|" + "---|---|" * len(cases)
    rows = cases[0]["rows"]
    several = len({row["loss"] for row in rows.values()}) > 1
    for key, row in rows.items():
        cells = [cell for case in cases for cell in _cells(case["rows"][key])]
        yield f"| {row['row']} | {row['loss'] if several else ''} | {' | '.join(cells)} |"


def _cells(row: dict[str, Any]) -> tuple[str, str]:
    """Seconds of fastkd's own row; of others how many times as long, with the range; megabytes."""
    low, high = row["lowest and highest of the rounds"]
    took = f"{row['times fastkd']:.2f} ({low:.2f} to {high:.2f})"
    if row["row"] == FASTKD:
        took = f"{row['seconds']:.3g} s"
    return took, f"{row['peak megabytes']:,.0f}"


def _absent(found: dict[str, Any]) -> Iterator[str]:
    for peer in PEERS:
        if peer in found["not installed"]:
            yield f"| {peer} | not installed |"
            continue
        whys = [
            f"{TITLES[name].lower()}: {group['cannot'][peer]}"
            for name, group in found["groups"].items()
            if peer in group["cannot"]
        ]
        if whys:
            yield f"| {peer} | {'; '.join(whys)} |"


def write_page(found: dict[str, Any], readme: Path) -> None:
    """Put the tables between their marks.

    Raises:
        AssertionError: the marks are not there, once each and in their order.
    """
    text = readme.read_text(encoding="utf-8")
    marked = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    assert len(marked.findall(text)) == 1, f"{readme.name} needs '{BEGIN}' and '{END}' once each"
    made = f"{BEGIN}\n{tables(found)}{END}"
    readme.write_text(marked.sub(lambda _: made, text), encoding="utf-8")
