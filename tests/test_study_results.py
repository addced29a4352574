"""The committed studies' scores, recomputed from their predictions, and what is said of them."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TASKS = ("STS-B", "MRPC", "CoLA", "SST-2")
SET = "selection"


class Chosen(NamedTuple):
    """A study that chooses one number of each loss."""

    field: str
    values: int
    losses: tuple[str, ...]


CHOSEN = {
    "study-glue-weights": Chosen(
        "weight", 5, ("tinybert", "score_mse", "prob_mse", "kl", "cosine", "relations", "hidden")
    ),
    "study-glue-rates": Chosen("rate", 5, ("logits", "labels", "general")),
}

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


class Found(NamedTuple):
    """A run's scores: recomputed, of the best one answer, and as the run noted it."""

    student: float
    teacher: float
    constant: float
    noted: float


# by task, loss and value
Scores = dict[tuple[str, str, float], Found]


def one_answer(task: str, labels: Array) -> float:
    """What the best one answer to everything scores; of STS-B nothing goes along with it."""
    if task == "STS-B":
        return 0.0
    return max(score(task, np.eye(2)[np.full(len(labels), of)], labels) for of in (0, 1))


@pytest.fixture(scope="module", params=CHOSEN)
def study(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def scores(study: str) -> Scores:
    pattern = rf"runs/(.*)/loss=(.*),{CHOSEN[study].field}=(.*)/seed-0/run/summary.json"
    found = {}
    with tarfile.open(RESULTS / f"{study}.tar.xz") as file:
        members = {member.name: member for member in file.getmembers()}

        def read(name: str) -> bytes:
            content = file.extractfile(members[name])
            assert content is not None
            return content.read()

        for name in members:
            if where := re.fullmatch(pattern, name):
                noted = json.loads(read(name))["after"]["score"]
                kept = np.load(io.BytesIO(read(name.replace("summary.json", "predictions.npz"))))
                labels = kept[f"{SET}/labels"]
                student, teacher = (
                    score(where[1], kept[f"{SET}/{model}"], labels)
                    for model in ("outputs", "teacher")
                )
                constant = one_answer(where[1], labels)
                found[where[1], where[2], float(where[3])] = Found(
                    student, teacher, constant, noted
                )
    return found


def test_scores_are_those_of_the_predictions(study: str, scores: Scores) -> None:
    assert len(scores) == len(TASKS) * len(CHOSEN[study].losses) * CHOSEN[study].values
    for found in scores.values():
        assert found.student == pytest.approx(found.noted, abs=1e-6)


def test_the_page_has_the_best_of_each_loss(study: str, scores: Scores) -> None:
    page = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    of_tasks = [next(found for key, found in scores.items() if key[0] == task) for task in TASKS]
    rows = [
        f"| {name} | " + " | ".join(f"{getattr(found, field):.3f}" for found in of_tasks) + " |"
        for name, field in (("one answer", "constant"), ("teacher", "teacher"))
    ]
    for loss in CHOSEN[study].losses:
        row = [f"`{loss}`"]
        for task in TASKS:
            of_task = {k[2]: v.student for k, v in scores.items() if k[:2] == (task, loss)}
            best = max(of_task, key=lambda value: of_task[value])
            row.append(f"{of_task[best]:.3f} ({best:g}), {min(of_task.values()):.3f}")
        rows.append("| " + " | ".join(row) + " |")
    missing = [row for row in rows if row not in page]
    assert not missing, "\n".join(missing)
