"""Tables of pages and reports, and whether what they say is a value, rounded."""

from __future__ import annotations

import re


def section_rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the table under one heading, without the columns' names."""
    return table_rows(text.partition(f"\n{heading}\n")[2])[1:]


def table_rows(text: str) -> list[list[str]]:
    """The cells of the tables up to the next heading."""
    section = re.split(r"\n##", text)[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows]


def agrees(said: str, value: float) -> bool:
    """Whether a number is a value, rounded."""
    places = len(said.partition(".")[2])
    return abs(float(said) - value) <= 0.5 * 10.0**-places + 1e-9
