"""What an evaluation on held-out rows says besides the losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastkd.data.tasks.metrics import Judged, measure, predictions_of
from fastkd.distributed import Ranks


class EmbeddingEvaluator:
    """An `Evaluator` of embeddings: the cosine of the student's and the teacher's of each text."""

    def __init__(self, rows: int, each: int, device: torch.device) -> None:
        """Begin with none.

        Args:
            rows: that are read in all.
            each: texts of a row.
            device: of the run.
        """
        self._rows = rows
        self._each = each
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        # of models whose embeddings aren't known nothing is added
        self._comparable = False

    def add(self, rows: Tensor, student: Tensor, teacher: Tensor | None) -> None:
        """Take in embeddings [texts, dim] of both models; those that count are first."""
        assert teacher is not None, "rows are read by two models"
        self._comparable = student.shape[-1] == teacher.shape[-1]
        if self._comparable:
            pair = student.double(), teacher.double()
            cosines = torch.nn.functional.cosine_similarity(*pair, dim=-1)
            self._sum += cosines[: len(rows) * self._each].sum()

    def results(self, ranks: Ranks) -> dict[str, Any]:
        """`sentence_cosine` (`None` where nothing could be compared), `rows`."""
        total = ranks.sum(self._sum).item()
        cosine = total / (self._rows * self._each) if self._comparable else None
        return {"sentence_cosine": cosine, "rows": self._rows}


class OutputEvaluator:
    """An `Evaluator` of classification heads: how near the student's outputs are to the teacher's.

    Of a head with one output, a reranker's, these are scores of a row's candidates.
    """

    def __init__(self, rows: int, each: int, outputs: int, device: torch.device) -> None:
        """Begin with none.

        Args:
            rows: that are read in all.
            each: sequences of a row.
            outputs: of a head.
            device: of the run.
        """
        shape = 2, rows, each, outputs
        self._outputs = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, rows: Tensor, student: Tensor, teacher: Tensor | None) -> None:
        """Take in outputs [sequences, outputs] of both models; those that count are first."""
        assert teacher is not None, "rows are read by two models"
        places = rows.to(student.device)
        for side, given in enumerate((student, teacher)):
            found = given.to(self._outputs).reshape(-1, *self._outputs.shape[2:])
            self._outputs[side, places] = found[: len(rows)]

    def results(self, ranks: Ranks) -> dict[str, Any]:
        """`agreement`, a section of numbers, and `rows`.

        Of scores `spearman` over all of them and, where a row has several candidates,
        `same_first`, the share of rows whose best one is the same; of classes `same_class`; of all
        `mean_absolute_difference`.

        Raises:
            UserError: an output that is not finite.
        """
        # every row was written by one rank
        student, teacher = ranks.sum(self._outputs).cpu().numpy()
        rows, each, outputs = student.shape
        regression = outputs == 1

        def predicted(given: npt.NDArray[np.float64], whose: Judged) -> npt.NDArray[np.generic]:
            flat = given.reshape(rows * each, outputs)
            return predictions_of(flat, regression=regression, whose=whose)

        found, expected = predicted(student, "student"), predicted(teacher, "teacher")
        said: dict[str, float] = {}
        if regression:
            said |= measure(["spearman"], found, expected)
            if each > 1:
                same = student.argmax(axis=1) == teacher.argmax(axis=1)
                said["same_first"] = float(same.mean())
        else:
            said["same_class"] = float((found == expected).mean())
        said["mean_absolute_difference"] = float(abs(student - teacher).mean())
        return {"agreement": said, "rows": rows}
