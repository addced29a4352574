"""The soak's own functions: fixed cases end as undisturbed, and what is wrong is called wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from soak import cases, page
from soak_cases import (
    AS_UNDISTURBED,
    FOR_EVER,
    NOT_STRUCK,
    OTHER,
    OTHERWISE,
    REFUSED,
    TRACEBACK,
    Case,
    Outcome,
    Reference,
    judge,
    make_reference,
    try_case,
)
from soak_processes import Ended, Launcher
from soak_scenarios import Result
from warm_server import LOSSES

# all that a cache needs, also late, and no more
IMPORTED = ("fastkd.cli", "fastkd.data.factory", "transformers.models.auto.modeling_auto")
IMPORTED += ("transformers.models.bert.tokenization_bert",)
IMPORTED += tuple(f"fastkd.losses.{name}" for name in LOSSES)
LINE = "fastkd: run: the disk failed; continue with --resume"
TRACE = "Traceback (most recent call last):\n  File x\nValueError: no"
RESULT = Result({"a": torch.arange(3.0)}, {"run": [{"total": 1.0}]})


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    started = Launcher(*IMPORTED)
    yield started
    started.close()


@pytest.fixture(scope="module")
def reference(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference("cache", tmp_path_factory.mktemp("soak") / "reference", launcher)


@pytest.mark.parametrize(
    "case", [Case("cache", "kill-call", 1), Case("cache", "ENOSPC", 2)], ids=str
)
def test_a_cache_is_built_again(
    case: Case, reference: Reference, launcher: Launcher, tmp_path: Path
) -> None:
    outcome = try_case(case, reference, tmp_path / "case", launcher)
    assert outcome.kind == AS_UNDISTURBED and outcome.is_right, outcome
    assert (tmp_path / "case" / "struck" / "struck").exists()


def test_other_blocks_are_told(reference: Reference, launcher: Launcher, tmp_path: Path) -> None:
    changed = Reference(
        reference.recipe, Result({}, {}, "0" * 64), reference.changes, reference.seconds
    )
    outcome = try_case(Case("cache", "kill-call", 1), changed, tmp_path / "case", launcher)
    assert outcome.kind == OTHER and not outcome.is_right, outcome


def ended(code: int, said: str = "") -> Ended:
    return Ended(code, "", said, 1.0)


def judged(
    fault: str, first: Ended, *later: Ended, difference: str = "", struck: bool = True
) -> tuple[str, bool]:
    """The outcome of a case, and whether it is right."""
    left = iter(later)
    kind, detail = judge(fault, struck, first, lambda: next(left), lambda _: difference)
    return kind, Outcome(Case("distill", fault, 0), kind, detail).is_right


def test_what_is_right_and_what_is_wrong() -> None:
    killed, full, well, refused = ended(-9), ended(2, LINE), ended(0), ended(2, LINE)
    assert judged("kill-call", killed, well) == (AS_UNDISTURBED, True)
    assert judged("kill-call", killed, well, difference="other values") == (OTHER, False)
    assert judged("flip", killed, well, difference="other values") == (OTHER, False)
    assert judged("flip", killed, refused) == (REFUSED, True)
    assert judged("kill-time", killed, refused, well) == (REFUSED, False)
    assert judged("ENOSPC", full, refused, refused) == (FOR_EVER, False)
    assert judged("ENOSPC", full, ended(1, TRACE)) == (TRACEBACK, False)
    assert judged("ENOSPC", ended(1, TRACE), well) == (TRACEBACK, False)
    assert judged("EROFS", ended(1), well) == (OTHERWISE, False)
    assert judged("flip", killed, ended(2, f"{LINE}\n{LINE}")) == (OTHERWISE, False)
    assert judged("kill-time", well, well, struck=False) == (NOT_STRUCK, True)
    assert judged("kill-time", ended(1), well, struck=False) == (OTHERWISE, False)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (Result(RESULT.weights, RESULT.losses), ""),
        # one bit of one weight
        (Result({"a": torch.tensor([0.0, 1.0, 2.0000002])}, RESULT.losses), "other values in a"),
        (Result(RESULT.weights, {"run": [{"total": 1.1}]}), "other losses in run"),
        (Result({}, RESULT.losses), "other files or tensors: a"),
        (Result(RESULT.weights, RESULT.losses, "x"), "other blocks in the cache"),
    ],
)
def test_a_changed_weight_is_another_weight(other: Result, expected: str) -> None:
    assert RESULT.difference(other) == expected


def test_other_ranks_may_round_otherwise_and_no_more() -> None:
    near = Result({"a": torch.tensor([0.0, 1.0, 2.000002])}, {"run": [{"total": 1.000002}]})
    assert RESULT.difference(near) == "other values in a"
    assert RESULT.difference(near, 1e-5) == ""
    assert RESULT.difference(Result(near.weights, {"run": [{"total": 1.1}]}), 1e-5) != ""
    assert RESULT.difference(Result(near.weights, {"run": []}), 1e-5) != ""
    assert RESULT.difference(Result({"a": torch.arange(2.0)}, near.losses), 1e-5) != ""


def test_cases_are_drawn_alike_and_a_wrong_one_can_be_repeated() -> None:
    first, again = cases(3), cases(3)
    drawn = [next(first) for _ in range(50)]
    assert drawn == [next(again) for _ in range(50)] and len(set(drawn)) == 50
    text = page([Outcome(drawn[0], AS_UNDISTURBED), Outcome(drawn[1], OTHER)], 3, 1, 2)
    assert f"- `{drawn[1]}`: {OTHER}" in text and f"`{drawn[0]}`" not in text
    assert "2 cases, 1 of them wrong" in text
