"""Damage to what a run has written about itself is one line that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastkd.errors import UserError
from fastkd.training.run_folder import RunFolder

BROKEN = (b"{", b"[]", b"3", b"\xff\xfe{}", b"\0\0\0\0", b"[" * 100_000, b'{"step": 1')


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_summary(tmp_path: Path, content: bytes) -> None:
    run = RunFolder(tmp_path)
    run.summary.write_bytes(content)
    with pytest.raises(UserError, match=r"summary.json is damaged .*; remove it") as raised:
        run.read_summary()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [*BROKEN, b"", b'{"loss": 1}', b'{"step": 1}'])
def test_a_broken_line_of_metrics(tmp_path: Path, content: bytes) -> None:
    run = RunFolder(tmp_path)
    whole = b'{"kind": "train", "step": 1}\n'
    run.metrics.write_bytes(whole + content + b"\n" + whole)
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is damaged .*; repair") as raised:
        run.rewind_metrics(1)
    assert "\n" not in str(raised.value)
    # the last line of a run that was killed
    run.metrics.write_bytes(whole + content)
    assert run.read_metrics() == [{"kind": "train", "step": 1}]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_environment(tmp_path: Path, content: bytes) -> None:
    run = RunFolder(tmp_path)
    run.environment.write_bytes(content)
    with pytest.raises(UserError, match=r"environment.json is damaged .*; put it back"):
        _ = run.started_in
