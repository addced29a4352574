"""`python -m benchmarks.rerun`: what it reads of results, what has moved, and its exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rerun, slim
from benchmarks.machine import machine
from benchmarks.processor import UNITS
from benchmarks.rerun import LONG, PARTS, QUOTED, QUOTED_LONG, Figure, Part, compared, moved
from benchmarks.training_step import ends_of

MACHINE = {"processor": "x", "python_version": "3"}
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
    # the ops' result has no quartiles yet
    without = name.startswith("kernels")
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
    """Not by single rounds, which lie further apart."""
    part, name = PARTS["step-8x128"], "fastkd distill"
    low, high = committed(part)["quartiles of the rounds"][name]
    # twice the mean of what lies between the quartiles of either
    bound = (high - low) + 0.1
    for by, expected in ((bound - 0.01, []), (bound + 0.01, [name])):
        found = committed(part)
        medians = found["times the trivial step, median of paired rounds"]
        medians[name] += by
        found["quartiles of the rounds"] = {
            of: [median - 0.05, median + 0.05] for of, median in medians.items()
        }
        lines = [line for line, has_moved in compared(part, found) if has_moved]
        assert [line.partition(":")[0] for line in lines] == expected
    assert lines == [f"{name}: 1.08 committed, 1.24 now (quartiles 1.19 to 1.29), MOVED"]


@pytest.mark.parametrize("name", ["kernels", "kernels-long"])
def test_an_op_that_is_much_slower_is_noticed(name: str) -> None:
    """By the quartiles that new results have: of the committed rounds the range alone is known,
    and that of some is wider than a slow-down by ten."""
    part = PARTS[name]
    quoted = [of for names in (QUOTED_LONG if name in LONG else QUOTED).values() for of in names]
    for slower, expected in ((1.0, False), (2.0, True), (10.0, True)):
        found = committed(part)
        for entry in found["benchmarks"].values():
            ratio = entry["times_the_op"]["definition"] / slower
            entry["times_the_op"]["definition"] = ratio
            entry["quartiles_of_times_the_op"] = {"definition": [0.9 * ratio, 1.1 * ratio]}
        moved_now = {line.partition(", def")[0]: has for line, has in compared(part, found)}
        assert {of: moved_now[of] for of in quoted} == dict.fromkeys(quoted, expected)


def test_results_have_quartiles_of_the_rounds() -> None:
    rounds = {"definition": [8.0, 1.0, 2.0, 4.0, 3.0], "op": [1.0] * 5}
    quartiles, ranges = ends_of(rounds)
    assert quartiles == {"definition": [2.0, 4.0], "op": [1.0, 1.0]}
    assert ranges == {"definition": [1.0, 8.0], "op": [1.0, 1.0]}


def test_a_kernel_that_fails_is_named_and_the_others_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pytest ends with 1, and its file lacks the benchmark."""
    part = PARTS["kernels"]
    found = committed(part)
    failed, *others = (name for names in QUOTED.values() for name in names)
    full = {
        "machine_info": {"cpu": {"brand_raw": found["processor"]}, **MACHINE},
        "benchmarks": [{"name": of, "extra_info": found["benchmarks"][of]} for of in others],
    }
    for left, lines in ((full, 1 + len(found_of(failed, part))), ({**full, "benchmarks": []}, 1)):
        script = ALONE.format(found=left, code=1)
        command = (sys.executable, "-c", script, "{folder}/full.json")
        monkeypatch.setattr(rerun, "PARTS", {"it": part._replace(command=command)})
        assert rerun.run([]) == 1
        wrong = capsys.readouterr().out.partition("not as committed:\n")[2].splitlines()
        assert wrong[0] == "it: it ended with exit code 1" and len(wrong) == lines
        assert all(failed in line and "not measured now" in line for line in wrong[1:])


def found_of(benchmark: str, part: Part) -> list[str]:
    return [name for name in part.figures(committed(part)) if name.startswith(benchmark)]


def test_no_result_is_made_of_no_benchmark(tmp_path: Path) -> None:
    empty, target = tmp_path / "full.json", tmp_path / "kernels.json"
    empty.write_text("")
    for source in (empty, tmp_path / "none.json"):
        with pytest.raises(SystemExit, match=f"{source.name} holds no benchmark; see what pytest"):
            slim.run([str(source), str(target)])
    assert not target.exists()
    benchmarks = [{"name": "a", "extra_info": {"x": 1}}]
    info = {"cpu": {"flags": ["fpu", "amx_bf16", "avx2"]}, **MACHINE}
    empty.write_text(json.dumps({"machine_info": info, "benchmarks": benchmarks}))
    slim.run([str(empty), str(target)])
    assert json.loads(target.read_text()) == {
        **{"processor": "x", UNITS: ["avx2", "amx_bf16"], "python": "3"},
        "benchmarks": {"a": {"x": 1}},
    }


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
                    lambda result: {
                        name: Figure(result[name]) for name in ("ratio", "other") if name in result
                    },
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


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({}, {"processor": "b"}, "one without a name, its units not noted; now: b, its units"),
        ({"processor": "b"}, {"processor": "b"}, None),
        (
            {"processor": "b", UNITS: ["avx2", "amx_bf16"]},
            {"processor": "b", UNITS: ["avx2"]},
            "committed: b with avx2, amx_bf16; now: b with avx2\n",
        ),
        ({"processor": "b", UNITS: ["avx2"]}, {"processor": "b", UNITS: ["avx2"]}, None),
        ({"processor": "b"}, {"processor": "b", UNITS: []}, "not noted; now: b with no units"),
    ],
    ids=["name", "old ones alike", "units", "alike", "an old one"],
)
def test_another_processor_is_named(
    old: dict[str, Any],
    new: dict[str, Any],
    said: str | None,
    part: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Clouds give one name to processors with and without matrix units."""
    ratios = {"ratio": 1.5, "other": 2.0}
    part({**ratios, **new})
    (rerun.RESULTS / "it.json").write_text(json.dumps({**ratios, **old}), encoding="utf-8")
    assert rerun.run([]) == 0
    found = capsys.readouterr().out
    assert said in found if said else "committed: " not in found
    assert isinstance(machine()[UNITS], list)


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
