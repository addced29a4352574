"""`python -m benchmarks.peers` on tiny models with the peers that are there, and its pure parts."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.peers import command, page, sentences
from benchmarks.peers.command import agreement
from benchmarks.peers.groups import FASTKD, PEERS, PLAIN, groups
from benchmarks.peers.layers import WEIGHTS, make_pair, mean_of_pairs, mean_of_tokens
from benchmarks.peers.rows import (
    Case,
    Group,
    Measured,
    Row,
    check_equal,
    first_step,
    gradient_lengths,
    move_weights,
)

RESULT = Path(command.RESULTS) / "peers-cpu.json"
GROUPS = {group.name: group for group in groups("cpu", quick=True)}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def row_of(group: str, name: str, loss: str) -> tuple[Row, Case]:
    (row,) = (one for one in GROUPS[group].rows if (one.name, one.loss) == (name, loss))
    return row, GROUPS[group].cases[0]


@pytest.mark.parametrize(
    ("group", "row"),
    [
        pytest.param(group, row, id=f"{group.name}-{row.key}")
        for group in GROUPS.values()
        for row in group.rows
        if not row.plain
    ],
)
def test_a_row_makes_the_step_of_plain_pytorch(group: Group, row: Row) -> None:
    if not row.installed:
        pytest.skip(f"{row.name} is not installed here; make peers installs it")
    (plain,) = (one for one in group.rows if one.plain and one.loss == row.loss)
    steps = {one.key: one.make(group.cases[0]) for one in (row, plain)}
    found = agreement([row, plain], group.cases[0], steps)
    assert set(found) == {row.loss}


def test_models_that_a_row_reads_again_are_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    row, case = row_of("embeddings", "sentence-transformers", "mse")
    if not row.installed:
        pytest.skip("sentence-transformers is not installed here; make peers installs it")
    made: list[Any] = []

    def make(*given: Any) -> Any:
        pair = make_pair(*given)
        made.extend(weakref.ref(model) for model in (pair.teacher, pair.student))
        return pair

    monkeypatch.setattr(sentences, "make_pair", make)
    step = row.make(case)
    gc.collect()
    assert len(made) == 2 and [ref() for ref in made] == [None, None]
    assert torch.isfinite(step.run())


@pytest.mark.parametrize("loss", ["scores", "probabilities"])
def test_a_step_that_leaves_something_out_is_told(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, case = row_of("layers", FASTKD, loss)
    plain, _ = row_of("layers", PLAIN, loss)
    # a percent of attention
    monkeypatch.setitem(WEIGHTS, loss, 0.99 * WEIGHTS[loss])
    wrong = row.make(case)
    monkeypatch.undo()
    steps = {row.key: wrong, plain.key: plain.make(case)}
    with pytest.raises(AssertionError, match=f"tiny, 2 x 16: the loss of fastkd, {loss} is"):
        agreement([row, plain], case, steps)


def test_a_loss_a_gradient_or_no_number_stops_the_run() -> None:
    exact, bound = Measured(2.0, 3.0), Measured(1e-6, 1e-6)
    near = Measured(2.0 + 5e-7, 3.0)
    assert check_equal({"a": near}, exact, bound, "here") == {
        "loss": pytest.approx(0.5),
        "gradient": 0.0,
    }
    for wrong, kind in (
        (Measured(2.0 + 2e-6, 3.0), "loss"),
        (Measured(2.0, 3.0 - 2e-6), "gradient"),
        (Measured(float("nan"), 3.0), "loss"),
    ):
        with pytest.raises(AssertionError, match=f"here: the {kind} of b is"):
            check_equal({"a": near, "b": wrong}, exact, bound, "here")


def test_weights_move_by_the_rounding_of_what_is_made_of_them() -> None:
    models = nn.Linear(400, 3), nn.Embedding(5, 400)
    before = copy.deepcopy(models)
    move_weights(models, 0)
    eps = torch.finfo(torch.float32).eps
    for now, then, most in zip(models, before, (20 * eps / 2, eps / 2), strict=True):
        moved = ((now.weight - then.weight).abs() / then.weight.abs()).detach()
        # what a moved weight is rounded to
        assert moved.mean() == pytest.approx(most, rel=0.5)
        assert moved.max() <= most + eps
    again = copy.deepcopy(before)
    move_weights(again, 0)
    assert torch.equal(again[0].weight, models[0].weight)


def test_the_gradient_is_that_which_the_optimiser_gets() -> None:
    row, case = row_of("embeddings", PLAIN, "mse")
    step = row.make(case)
    start = [p.detach().clone() for g in step.optimizer.param_groups for p in g["params"]]
    found = first_step(step)
    assert found.loss > 0 and found.gradient > 0
    now = [p for g in step.optimizer.param_groups for p in g["params"]]
    assert any(not torch.equal(a, b) for a, b in zip(start, now, strict=True))
    with gradient_lengths(step.optimizer) as lengths:
        step.run()
        step.run()
    assert len(lengths) == 2


def test_means_count_what_is_no_padding() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    pairs = torch.full((2, 4, 3, 3), 100.0)
    pairs[0, :, :2, :2], pairs[1, :, :1, :1] = 2.0, 3.0
    # four pairs of 4, and one of 9
    assert float(mean_of_pairs(pairs, mask)) == pytest.approx((4 * 4 + 9) / 5)
    tokens = torch.full((2, 3, 5), 100.0)
    tokens[0, :2], tokens[1, :1] = 2.0, 3.0
    assert float(mean_of_tokens(tokens, mask)) == pytest.approx((2 * 4 + 9) / 3)
    pair = make_pair(Case("tiny", 2, 16, "cpu"), "sdpa")
    lengths = pair.mask.sum(dim=1)
    assert lengths.tolist() == [2, 16] and pair.weight_of_mean("scores") == 1.0
    assert pair.weight_of_mean("probabilities") == pytest.approx(100 * (4 + 256) / 18)


@pytest.mark.slow
def test_a_quick_run_goes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTKD_BENCH_THREADS", "1")
    output = tmp_path / "peers.json"
    command.run(["--quick", "--only", "embeddings", "--output", str(output)])
    found = json.loads(output.read_text(encoding="utf-8"))
    capfd.readouterr()
    (case,) = found["groups"]["embeddings"]["cases"]
    present = [row.key for row in GROUPS["embeddings"].present]
    assert list(case["rows"]) == present and case["rounds"] == 2
    for row in case["rows"].values():
        assert row["seconds"] > 0 and row["peak megabytes"] > 0
        low, high = row["lowest and highest of the rounds"]
        assert low <= row["times fastkd"] <= high
    assert case["rows"][f"{FASTKD}, mse"]["times fastkd"] == 1
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n", encoding="utf-8")
    page.write_page(found, readme)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert page.tables(found) in text
    page.write_page(found, readme)
    assert readme.read_text(encoding="utf-8") == text


def test_bad_arguments_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit) as ended:
            command.run(["--device", "cuda"])
        assert ended.value.code == 2 and "finds no GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        command.run(["--rounds", "0"])
    assert ended.value.code == 2 and "at least 1" in capsys.readouterr().err


def a_result() -> dict[str, Any]:
    row = {"loss": "mse", "seconds": 0.5, "peak megabytes": 1234.4}
    own = {"row": FASTKD, "times fastkd": 1.0, "lowest and highest of the rounds": [1.0, 1.0]}
    other = {"row": PLAIN, "times fastkd": 1.25, "lowest and highest of the rounds": [1.2, 1.31]}
    rows = {"fastkd, mse": {**row, **own}, "plain PyTorch, mse": {**row, **other}}
    case = {"size": "small", "batch": 2, "tokens": 16, "rows": rows}
    return {
        "processor": "a processor",
        "threads": 2,
        "dtype": "float32",
        "torch": "2",
        "packages": {"transformers": "5"},
        "not installed": ["TRL"],
        "groups": {
            "embeddings": {
                "what": "squares",
                "cannot": {"TRL": "decoders alone", "TextBrewer": "states alone"},
                "cases": [case, {**case, "batch": 4}],
            }
        },
    }


def test_tables_say_how_many_times_as_long_a_row_takes() -> None:
    lines = page.tables(a_result()).splitlines()
    assert lines[0] == "a processor, 2 threads, float32, torch 2, transformers 5."
    assert "| small | | 2 x 16 | MB | 4 x 16 | MB |" in lines
    assert "| fastkd |  | 0.5 s | 1,234 | 0.5 s | 1,234 |" in lines
    assert (
        "| plain PyTorch |  | 1.25 (1.20 to 1.31) | 1,234 | 1.25 (1.20 to 1.31) | 1,234 |" in lines
    )
    assert lines[-2:] == ["| TextBrewer | embeddings: states alone |", "| TRL | not installed |"]


def test_the_marks_must_be_there_once(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    for text in ("nothing\n", 2 * f"{page.BEGIN}\n{page.END}\n", f"{page.END}\n{page.BEGIN}\n"):
        readme.write_text(text, encoding="utf-8")
        with pytest.raises(AssertionError, match="once each"):
            page.write_page(a_result(), readme)


def test_every_peer_does_a_job_or_there_is_a_word_why_not() -> None:
    for group in GROUPS.values():
        doing = {peer for peer in PEERS if any(row.name.startswith(peer) for row in group.rows)}
        # one that makes a part of a job has a row and a word
        assert doing | set(group.cannot) == set(PEERS)
        assert set(group.cannot) <= set(PEERS)


def test_a_row_without_its_package_is_left_out() -> None:
    row, _ = row_of("embeddings", PLAIN, "mse")
    absent = replace(row, imports=("no_such_package.part",))
    group = replace(GROUPS["embeddings"], rows=(row, absent))
    assert row.installed and not absent.installed and group.present == [row]


def test_the_committed_tables_are_those_of_the_committed_result() -> None:
    if not RESULT.is_file():
        pytest.skip("no result of make peers is committed yet")
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    assert page.tables(found) in command.README.read_text(encoding="utf-8")
