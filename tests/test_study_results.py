"""The committed studies' scores, recomputed from their predictions, and what is said of them."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "benchmarks" / "results" / "study-glue-weights.tar.xz"
TASKS = ("STS-B", "MRPC", "CoLA", "SST-2")
LOSSES = ("tinybert", "score_mse", "prob_mse", "kl", "cosine", "relations", "hidden")
SET = "selection"

Array = npt.NDArray[np.float32]


def score(task: str, outputs: Array, labels: Array) -> float:
    """GLUE's own number of a task."""
    if task == "STS-B":
        given = outputs[:, 0]
        return float(pearsonr(given, labels)[0] + spearmanr(given, labels)[0]) / 2
    said = outputs.argmax(1)
    if task == "MRPC":
        return float(accuracy_score(labels, said) + f1_score(labels, said)) / 2
    return float((matthews_corrcoef if task == "CoLA" else accuracy_score)(labels, said))


@pytest.fixture(scope="module")
def scores() -> dict[tuple[str, str, float], tuple[float, float, float]]:
    """By task, loss and weight: of the student and the teacher, recomputed, and as it was noted."""
    found = {}
    with tarfile.open(WEIGHTS) as file:
        members = {member.name: member for member in file.getmembers()}

        def read(name: str) -> bytes:
            content = file.extractfile(members[name])
            assert content is not None
            return content.read()

        for name in members:
            if where := re.fullmatch(
                r"runs/(.*)/loss=(.*),weight=(.*)/seed-0/run/summary.json", name
            ):
                noted = json.loads(read(name))["after"]["score"]
                kept = np.load(io.BytesIO(read(name.replace("summary.json", "predictions.npz"))))
                labels = kept[f"{SET}/labels"]
                student, teacher = (
                    score(where[1], kept[f"{SET}/{model}"], labels)
                    for model in ("outputs", "teacher")
                )
                found[where[1], where[2], float(where[3])] = student, teacher, noted
    return found


def test_scores_are_those_of_the_predictions(
    scores: dict[tuple[str, str, float], tuple[float, float, float]],
) -> None:
    assert len(scores) == len(TASKS) * len(LOSSES) * 5
    for student, _, noted in scores.values():
        assert student == pytest.approx(noted, abs=1e-6)


def test_the_page_has_the_best_of_each_loss(
    scores: dict[tuple[str, str, float], tuple[float, float, float]],
) -> None:
    page = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    teacher = [next(v[1] for k, v in scores.items() if k[0] == task) for task in TASKS]
    rows = ["| teacher | " + " | ".join(f"{value:.3f}" for value in teacher) + " |"]
    for loss in LOSSES:
        row = [f"`{loss}`"]
        for task in TASKS:
            of_task = {k[2]: v[0] for k, v in scores.items() if k[:2] == (task, loss)}
            best = max(of_task, key=lambda weight: of_task[weight])
            row.append(f"{of_task[best]:.3f} ({best:g}), {min(of_task.values()):.3f}")
        rows.append("| " + " | ".join(row) + " |")
    missing = [row for row in rows if row not in page]
    assert not missing, "\n".join(missing)
