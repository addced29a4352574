"""What the exported student and its teacher give each example that a task is scored on: one file.

Scores say how often a model is right; this says on which examples, for tests of two students on the
same ones. The file follows the evaluations of a run. What a checkpoint holds of it is all there is
to know, so a run that is continued writes it anew: that of a step after the checkpoint goes.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastkd.data.tasks.datamodule import TaskDataModule
from fastkd.training.evaluate import Evaluation
from fastkd.training.run_folder import RunFolder
from fastkd.training.setup import Run


class Predictions:
    """The predictions of a run that shall have some; the first rank alone holds and writes them."""

    def __init__(self, run: Run, folder: RunFolder) -> None:
        self._run = run
        self._folder = folder
        self._kept = run.recipe.run.predictions and run.ranks.is_main
        self._step = 0
        self._outputs: dict[str, npt.NDArray[np.float32]] = {}
        """[examples, outputs] by what they are called in the file."""

    def observe(self, step: int, evaluation: Evaluation) -> None:
        """Take in, and write, the evaluation of the student that would be exported.

        Raises:
            UserError: the disk is full.
        """
        if not self._kept:
            return
        self._step = step
        for name, outputs in evaluation.outputs.items():
            self._outputs[f"{name}/outputs"] = outputs
        # which is judged once
        for name, outputs in evaluation.teacher_outputs.items():
            self._outputs[f"{name}/teacher"] = outputs
        self._write()

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        outputs = {name: torch.from_numpy(found) for name, found in self._outputs.items()}
        return {"step": self._step, "outputs": outputs} if self._kept else {}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; without a checkpoint from nothing.

        Raises:
            UserError: the disk is full.
        """
        if not self._kept:
            return
        if not state:
            self._folder.predictions.unlink(missing_ok=True)
            return
        self._step = state["step"]
        self._outputs = {name: found.numpy() for name, found in state["outputs"].items()}
        self._write()

    def _write(self) -> None:
        data = self._run.datamodule
        assert isinstance(data, TaskDataModule), "a recipe asks for those of a task alone"
        labels = {f"{name}/labels": found.labels for name, found in data.evaluations.items()}
        arrays: dict[str, Any] = {**labels, **self._outputs, "step": np.asarray(self._step)}
        made = io.BytesIO()
        np.savez_compressed(made, **{name: arrays[name] for name in sorted(arrays)})
        self._folder.write_predictions(made.getvalue())
