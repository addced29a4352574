"""What an embedding model knows of GLUE's pairs as it is: the cosine of mean-pooled embeddings.

`python -m benchmarks.zero_shot --glue FOLDER [--output FILE]`. all-MiniLM-L6-v2, whole and cut to
the layers that students start from, before any fine-tuning. Of STS-B the cosine is the answer; of
MRPC a pair counts as equal from the cosine on that is best on the training set. Scores are GLUE's
own of the dev sets, with 95 % intervals over their examples: the controls of the studies on GLUE
that need no training.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.embedding_loop import truncated
from benchmarks.embeddings import TEACHER, cosines
from benchmarks.machine import machine, report
from fastkd.data.tasks import GLUE, Examples, Task, read_examples
from fastkd.data.tasks.metrics import measure, task_score
from fastkd.data.tasks.retention import Judge

LAYERS = {"whole": (1, 2, 3, 4, 5, 6), "every second": (2, 4, 6), "first three": (1, 2, 3)}

Answers = npt.NDArray[np.float64]


def answers_of(model: Any, examples: Examples) -> Answers:
    """The cosine of each pair."""
    pairs = [(first, second, 0.0) for first, second in examples.texts]
    return np.array(cosines(model, pairs))


def best_threshold(task: Task, found: Answers, labels: npt.ArrayLike) -> float:
    """From which cosine on pairs are equal, in hundredths."""

    def score(least: float) -> float:
        return task_score({"train": measure(task.metrics, found >= least, labels)})

    return float(max(np.arange(0, 100) / 100, key=score))


def judged(task: Task, outputs: Answers, labels: Any) -> dict[str, Any]:
    """GLUE's number of outputs [examples, outputs], and its interval."""
    number = Judge(task, {"dev": labels}).of_outputs({"dev": outputs})
    return {
        "score": round(number.value, 4),
        "interval": [round(end, 4) for end in number.interval()],
    }


def of_model(layers: Sequence[int], glue: Path, cache: Path) -> dict[str, Any]:
    """What some layers score on both tasks."""
    model = truncated(TEACHER, tuple(layers)).eval()

    def read(task: Task, split: str) -> tuple[Answers, Any]:
        examples = read_examples(task, glue, split, cache)
        return answers_of(model, examples), examples.labels

    similarity, paraphrase = GLUE["STS-B"], GLUE["MRPC"]
    found, labels = read(similarity, "dev")
    least = best_threshold(paraphrase, *read(paraphrase, "train"))
    paired, equal = read(paraphrase, "dev")
    said = np.eye(2)[(paired >= least).astype(int)]
    return {
        "STS-B": judged(similarity, found[:, None], labels),
        "MRPC": {**judged(paraphrase, said, equal), "equal from": least},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glue", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with TemporaryDirectory() as cache:
        found = {name: of_model(layers, given.glue, Path(cache)) for name, layers in LAYERS.items()}
    what = "cosines of mean-pooled embeddings on dev sets, before any fine-tuning"
    report({"what": what, **machine(), "models": found}, given.output)


if __name__ == "__main__":
    main()
