"""Pages in a headless Chromium: what a browser makes of them at some width, in a light or dark
mode."""

from __future__ import annotations

import json
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
# looks at a page in a frame of some width, and leaves what it found as text
_PROBE = Path(__file__).with_name("page_probe.js")


def chromium() -> str | None:
    """Path of a browser on this machine, if there is one."""
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


needs_chromium = pytest.mark.skipif(
    chromium() is None, reason="no Chromium or Chrome on this machine (Debian: chromium)"
)


def dump(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The page's elements after it was loaded (stdout), and what its console said (stderr)."""
    browser = chromium()
    assert browser is not None, "a test without the mark needs_chromium"
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr")
    return subprocess.run(
        [browser, *fixed, *options, "--dump-dom", str(page)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def look(folder: Path, pages: list[Path], widths: list[int], *, dark: bool) -> list[dict[str, Any]]:
    """What `page_probe.js` says of each page at each width, one after the other.

    Args:
        folder: a file is written to.
        pages: files.
        widths: of the window, in pixels.
        dark: the mode that the reader prefers.
    """
    given = json.dumps([[page.as_uri(), width] for page in pages for width in widths])
    probe = folder / "probe.html"
    probe.write_text(
        f"<!doctype html><body><script>const PAGES = {given};\n{_PROBE.read_text()}</script></body>"
    )
    mode = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    done = dump(probe, mode, "--allow-file-access-from-files", "--virtual-time-budget=60000")
    assert "CONSOLE" not in done.stderr, done.stderr
    assert '<pre id="found">' in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    found = done.stdout.split('<pre id="found">')[1].split("</pre>")[0]
    results: list[dict[str, Any]] = json.loads(unescape(found))
    return results
