"""metrics.jsonl as it grows: each line is read once, and a damaged one is named."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastkd.errors import UserError
from fastkd.training.metric_lines import Line


class MetricsFile:
    """metrics.jsonl, of which each line is read once, also while another process writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._read, self._lines = -1, 0, 0

    def new_lines(self) -> Iterator[Line]:
        """The whole lines behind those that were taken before; all of them of another file.

        Raises:
            UserError: a line is no record.
        """
        if not self._path.is_file():
            return
        # of all lines, whose columns are the same
        columns: dict[str, str] = {}
        with self._path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._read:
                self._inode, self._read, self._lines = status.st_ino, 0, 0
            file.seek(self._read)
            for content in file:
                if not content.endswith(b"\n"):
                    return
                self._read, self._lines = self._read + len(content), self._lines + 1
                where = f"{self._path}, line {self._lines}"
                line = parse_object(content, where, "repair or remove that line", "kind", "step")
                yield {columns.setdefault(name, name): v for name, v in line.items()}


def parse_object(content: bytes, where: str, remedy: str, *keys: str) -> dict[str, Any]:
    """A JSON object with some keys, in one line or a whole file."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged ({error}); {remedy}") from error
    if not isinstance(found, dict) or not found.keys() >= set(keys):
        named = f" with {' and '.join(keys)}" if keys else ""
        raise UserError(f"{where} is damaged (no JSON object{named}); {remedy}")
    return found
