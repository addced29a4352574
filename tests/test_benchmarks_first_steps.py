"""What the quick start says that its steps take is what was measured of them."""

import json
from pathlib import Path

from benchmarks.first_steps import ROOT, STEPS, write_files


def test_the_quick_start_has_the_seconds_of_its_steps() -> None:
    text = (ROOT / "benchmarks" / "results" / "first-steps.json").read_text(encoding="utf-8")
    seconds = json.loads(text)["seconds"]
    assert seconds.keys() == {"clone", *STEPS}
    page = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8")
    table = dict(row.strip("| ").split(" | ") for row in page.splitlines() if row.startswith("| "))
    del table["step"]
    said = {name.partition(" (")[0]: int(value) for name, value in table.items()}
    assert said == {name: round(seconds[name]) for name in STEPS}
    assert "took 9 minutes" in page and round(sum(seconds.values()) / 60) == 9


def test_a_stranger_brings_a_text_and_the_loss_of_the_page(tmp_path: Path) -> None:
    (tmp_path / "docs" / "guide").mkdir(parents=True)
    page = ROOT / "docs" / "quick-start.md"
    (tmp_path / "docs" / "quick-start.md").write_text(page.read_text(encoding="utf-8"))
    for name in ("a", "b"):
        (tmp_path / "docs" / "guide" / f"{name}.md").write_text(f"{name} one\n\n{name} two\n")
    write_files(tmp_path)
    assert (tmp_path / "text.txt").read_text() == "a one\na two\n\n\nb one\nb two\n"
    assert (tmp_path / "lengths.py").read_text().startswith("from fastkd import")
