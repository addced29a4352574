"""Scores of the committed studies, recomputed from predictions by scikit-learn and SciPy."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TASKS = ("STS-B", "MRPC", "CoLA", "SST-2")
PREDICTIONS = "predictions.npz"

Array = npt.NDArray[np.float32]


class Found(NamedTuple):
    """A run's scores: recomputed, of the best one answer, and as the run noted it."""

    student: float
    teacher: float | None
    constant: float
    noted: float


# task, condition and seed
Run = tuple[str, str, int]
Runs = dict[Run, Found]


def archive_of(study: str) -> Path:
    """Where a study's state lies."""
    return RESULTS / f"{study}.tar.xz"


def read_runs(study: str) -> Runs:
    """Every finished run of a study."""
    kept, noted = {}, {}
    for run, name, content in _files(study):
        if name == "summary.json":
            noted[run] = json.loads(content)["after"]["score"]
        elif name == PREDICTIONS:
            kept[run] = _arrays(content)
    return {run: _found(run[0], kept[run], score) for run, score in noted.items()}


def read_predictions(study: str) -> dict[Run, dict[str, Array]]:
    """What every finished run of a study gave out."""
    return {run: _arrays(content) for run, name, content in _files(study) if name == PREDICTIONS}


def _files(study: str) -> Iterator[tuple[Run, str, bytes]]:
    """The files of its runs, by their names."""
    with tarfile.open(archive_of(study)) as file:
        # in the archive's order: a step back would unpack it from its start again
        for member in file:
            where = re.fullmatch(r"runs/(.*)/(.*)/seed-(\d+)/run/(.*)", member.name)
            content = file.extractfile(member)
            if where is not None and content is not None:
                task, condition, seed, name = where.groups()
                yield (task, condition, int(seed)), name, content.read()


def _arrays(content: bytes) -> dict[str, Array]:
    return dict(np.load(io.BytesIO(content)))


def _found(task: str, kept: dict[str, Array], noted: float) -> Found:
    (name,) = {key.split("/")[0] for key in kept if "/" in key}
    labels = kept[f"{name}/labels"]
    student = score(task, kept[f"{name}/outputs"], labels)
    # a teacher that is fine-tuned has none itself
    taught = kept.get(f"{name}/teacher")
    teacher = None if taught is None else score(task, taught, labels)
    return Found(student, teacher, one_answer(task, labels), noted)


def score(task: str, outputs: Array, labels: Array) -> float:
    """GLUE's own number of a task."""
    return _score(task, outputs.astype(np.float32).tobytes(), labels.astype(np.float32).tobytes())


# the runs of a task share their labels and one answer, those of a seed their teacher as well
@cache
def _score(task: str, outputs: bytes, labels: bytes) -> float:
    right = np.frombuffer(labels, np.float32)
    given = np.frombuffer(outputs, np.float32).reshape(len(right), -1)
    if task == "STS-B":
        # with one answer to everything nothing goes along
        if np.ptp(given) == 0:
            return 0.0
        return float(pearsonr(given[:, 0], right)[0] + spearmanr(given[:, 0], right)[0]) / 2
    said = given.argmax(1)
    if task == "MRPC":
        return float(accuracy_score(right, said) + f1_score(right, said)) / 2
    return float((matthews_corrcoef if task == "CoLA" else accuracy_score)(right, said))


def one_answer(task: str, labels: Array) -> float:
    """What the best one answer to everything scores."""
    if task == "STS-B":
        return score(task, np.zeros((len(labels), 1), np.float32), labels)
    return max(score(task, np.eye(2)[np.full(len(labels), of)], labels) for of in (0, 1))
