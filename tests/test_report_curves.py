"""Panels of a report, line by line: which numbers stand in which, under what title."""

from __future__ import annotations

from typing import Any

from fastkd.reporting.curves import (
    heldout_panels,
    last_weights,
    loss_panels,
    score_panels,
    training_panels,
)
from fastkd.reporting.svg import Line, Panel
from fastkd.training.metric_lines import make_line

STEPS = [0, 4]


def records(kind: str, *values: dict[str, Any]) -> list[dict[str, Any]]:
    return [make_line(kind, step, of) for step, of in zip(STEPS, values, strict=True)]


def test_panels_of_evaluations() -> None:
    losses = ({"a/1-2": 4.0, "a/2-4": 6.0, "b": 2.0}, {"a/1-2": 3.0, "a/2-4": 5.0, "b": 1.0})
    rest = {"sentence_cosine": None, "scores": {}}
    found = heldout_panels(
        records(
            "heldout",
            *(
                {"total": total, "losses": of, "perplexity": 9.0, "agreement": {"kl_div": 0.5}}
                | rest
                for total, of in zip((12.0, 9.0), losses, strict=True)
            ),
        )
    )
    pairs = [Line("1-2", STEPS, [4.0, 3.0]), Line("2-4", STEPS, [6.0, 5.0])]
    assert found == [
        Panel([Line("", STEPS, [12.0, 9.0])], "total, weighted", log=True),
        Panel(pairs, "a", log=True, legend="student-teacher"),
        Panel([Line("", STEPS, [2.0, 1.0])], "b", log=True),
        # no cosine, as there is none
        Panel([Line("", STEPS, [9.0, 9.0])], "perplexity"),
        Panel([Line("kl_div", STEPS, [0.5, 0.5])], "student and teacher, kl div"),
    ]


def test_many_pairs_are_told_apart_by_the_students_layer() -> None:
    many = {f"a/{s}-{t}": float(s + t) for s in (1, 2) for t in range(1, 9)}
    (panel,) = loss_panels(records("heldout", {"losses": many}, {"losses": many}))
    assert panel.legend == "by student layer" and len(panel.lines) == 16
    assert [line.group for line in panel.lines] == ["student layer 1"] * 8 + ["student layer 2"] * 8
    del many["a/2-8"]
    (panel,) = loss_panels(records("heldout", {"losses": many}, {"losses": many}))
    assert panel.legend == "student-teacher" and {line.group for line in panel.lines} == {None}


def test_panels_of_steps() -> None:
    lines = records(
        "train",
        *(
            {
                "loss": 2.0 * n,
                "losses": {"a/1-2": 1.0, "a/2-4": 0.0},
                "weighted": {"a/1-2": 2.0 * n, "a/2-4": 0.0},
                "learning_rate": 0.1 * n,
                "gradient_norm": 5.0 * n,
                "tokens_per_second": 100.0 * n,
            }
            for n in (1, 2)
        ),
    )
    total = Line("total", STEPS, [2.0, 4.0], reference=True)
    parts = [Line("a", STEPS, [2.0, 4.0]), total]
    pairs = [Line("1-2", STEPS, [1.0, 1.0]), Line("2-4", STEPS, [0.0, 0.0])]
    assert training_panels(lines) == [
        Panel(parts, "loss, and what each term adds to it", log=True, legend=""),
        Panel(pairs, "a", log=True, legend="student-teacher"),
        Panel([Line("", STEPS, [0.1, 0.2])], "learning rate, last step"),
        Panel([Line("", STEPS, [5.0, 10.0])], "norm of the gradient, last step", log=True),
        Panel([Line("", STEPS, [100.0, 200.0])], "tokens a second"),
    ]
    # of a loss that is 0 no weight is known
    assert last_weights(lines) == {"a/1-2": 4.0} and last_weights([]) == {}


def test_scores_stand_beside_the_teachers() -> None:
    of = ({"score": a, "mteb": {"STS": 2 * a}} for a in (0.25, 0.5))
    task, sts = score_panels(records("heldout", *of), {"score": 0.75})
    level = Line("teacher", STEPS, [0.75, 0.75], reference=True)
    assert task == Panel([Line("student", STEPS, [0.25, 0.5]), level], "score", legend="")
    # in which the teacher was not judged
    assert sts == Panel([Line("student", STEPS, [0.5, 1.0])], "STS", legend="")
