"""`python -m benchmarks.rerun`: what it reads of results, what has moved, and its exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rerun
from benchmarks.rerun import LONG, PARTS, QUOTED, QUOTED_LONG, Figure, Part, compared, moved

ALONE = "import json, sys; json.dump({found}, open(sys.argv[1], 'w')); sys.exit({code})"


def committed(part: Part) -> dict[str, Any]:
    return json.loads((rerun.RESULTS / part.committed).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PARTS)
def test_every_part_reads_figures_of_its_committed_result(name: str) -> None:
    found = PARTS[name].figures(committed(PARTS[name]))
    assert found and all(figure.value > 0 for figure in found.values())
    if name.startswith("kernels"):
        quoted = QUOTED_LONG if name in LONG else QUOTED
        # a ratio, and the memory of both ways or, where there are two algorithms, of three
        assert len(found) == sum(3 + ("score_mse" in op) for op in quoted for _ in quoted[op])
    if name.startswith("step"):
        assert "output_attentions" in found and "trivial loss" not in found
    # a result of two kinds has no quartiles yet
    without = name.startswith(("step", "kernels"))
    assert all((figure.quartiles is None) == without for figure in found.values())
    for value, rounds, quartiles in found.values():
        if rounds is not None:
            ends = quartiles or rounds
            assert rounds[0] <= ends[0] <= value <= ends[1] <= rounds[1]
    if name == "teacher-dtypes":
        assert found["8 x 128, fp32 / int8"].value == pytest.approx(1.986, abs=1e-3)
        assert found["8 x 128, fp32 / int8"].quartiles == pytest.approx((1.658, 2.026), abs=1e-3)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (Figure(1.0), Figure(1.2, (1.14, 1.25)), False),
        (Figure(1.0), Figure(1.2, (1.16, 1.25)), True),
        (Figure(1.0, (0.9, 1.1)), Figure(1.2, (1.15, 1.3)), False),
        (Figure(1.3), Figure(1.2, (1.15, 1.3)), False),
        (Figure(1.0, (0.6, 1.4)), Figure(1.2, (0.8, 1.5), (1.14, 1.25)), False),
        (Figure(1.0, (0.6, 1.4)), Figure(1.2, (0.8, 1.5), (1.16, 1.25)), True),
        (Figure(1.0, (0.6, 1.4), (0.97, 1.05)), Figure(1.2, None, (1.14, 1.28)), False),
        (Figure(1.0, (0.6, 1.4), (0.97, 1.05)), Figure(1.2, None, (1.17, 1.28)), True),
        (Figure(1.0, None, (0.8, 1.2)), Figure(1.2, (1.19, 1.21)), False),
        (Figure(100.0), Figure(101.9), False),
        (Figure(100.0), Figure(97.9), True),
    ],
    ids=[
        "near",
        "far",
        "both have rounds",
        "above",
        "quartiles near",
        "quartiles far",
        "quartiles of both near",
        "quartiles of both far",
        "quartiles before",
        "memory",
        "other memory",
    ],
)
def test_a_figure_has_moved_if_its_rounds_lie_nearer(
    before: Figure, now: Figure, expected: bool
) -> None:
    assert moved(before, now) is expected


def test_a_step_moves_by_the_quartiles_of_its_rounds() -> None:
    """Not by single rounds, of which the committed ones lie between 0.6 and 1.4."""
    part, name = PARTS["step-8x128"], "fastkd distill"
    for by, expected in ((0.19, []), (0.21, [name])):
        found = committed(part)
        medians = found["times the trivial step, median of paired rounds"]
        medians[name] += by
        found["quartiles of the rounds"] = {
            of: [median - 0.05, median + 0.05] for of, median in medians.items()
        }
        lines = [line for line, has_moved in compared(part, found) if has_moved]
        assert [line.partition(":")[0] for line in lines] == expected
    assert lines == [f"{name}: 1.07 committed, 1.28 now (quartiles 1.23 to 1.33), MOVED"]


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the one part: a command that leaves a result, or none, and ends with a code."""
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(rerun, "RESULTS", results)
    (results / "it.json").write_text(json.dumps({"ratio": 1.5, "other": 2.0}), encoding="utf-8")

    def make(found: dict[str, Any] | None, code: int = 0) -> None:
        script = f"import sys; sys.exit({code})"
        if found is not None:
            script = ALONE.format(found=found, code=code)
        monkeypatch.setattr(
            rerun,
            "PARTS",
            {
                "it": Part(
                    "it.json",
                    (sys.executable, "-c", script, "{folder}/it.json"),
                    lambda result: {name: Figure(value) for name, value in result.items()},
                    {},
                )
            },
        )

    return make


def test_what_is_as_committed_is_said(
    part: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    part({"ratio": 1.51, "other": 2.0})
    assert rerun.run(["--keep", str(tmp_path / "kept")]) == 0
    said = capsys.readouterr().out
    assert "ratio: 1.5 committed, 1.51 now" in said and said.endswith("all as committed\n")
    assert "committed: " not in said
    assert json.loads((tmp_path / "kept" / "it" / "it.json").read_text())["ratio"] == 1.51
    with pytest.raises(SystemExit, match="2"):
        rerun.run(["--keep", str(tmp_path / "kept")])
    assert "kept is there already; give a new folder" in capsys.readouterr().err


def test_what_takes_long_is_measured_when_it_is_asked_for(
    part: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    part({"ratio": 1.5, "other": 2.0})
    monkeypatch.setattr(rerun, "LONG", ("it",))
    for asked, measured in (([], 0), (["--only", "it"], 1), (["--only", "it", "it"], 1)):
        assert rerun.run(asked) == 0
        assert capsys.readouterr().out.count("it, ") == measured


def test_another_processor_is_named(part: Any, capsys: pytest.CaptureFixture[str]) -> None:
    part({"ratio": 1.5, "other": 2.0, "processor": "a new one"})
    assert rerun.run([]) == 0
    assert "  committed: one without a name; now: a new one\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "code", "named"),
    [
        ({"ratio": 1.6, "other": 2.0}, 0, "it: ratio: 1.5 committed, 1.6 now, MOVED"),
        ({"ratio": 1.5}, 0, "it: other: 2 committed, not measured now"),
        ({"ratio": 1.5, "other": 2.0}, 3, "it: it ended with exit code 3"),
        (None, 1, "it: it ended with exit code 1"),
        (None, 0, "it: it left no result"),
    ],
    ids=["moved", "missing", "failed", "nothing", "silent"],
)
def test_what_is_not_is_named(
    found: Any, code: int, named: str, part: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    part(found, code)
    assert rerun.run([]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == named
