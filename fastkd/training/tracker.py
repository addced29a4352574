"""trackio as a tracker of a run; TensorBoard and W&B are written to by DeepSpeed's monitor, which
knows of no run that goes on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

_PROJECT = "fastkd"


class TrackioMonitor:
    """Writes to trackio's files on this machine, or wherever its own variables say.

    Args:
        folder: of the run, whose path is the name of the run in the project `fastkd`.
        goes_on: whether the run continues one that was stopped, under the same name; what that
            had told of steps that are made again stays there beside the new.
    """

    def __init__(self, folder: Path, *, goes_on: bool) -> None:
        import trackio

        # its readings of processors and GPUs would be an axis of their own
        self._run = trackio.init(
            _PROJECT,
            name=str(folder),
            resume="allow" if goes_on else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write_events(self, events: Iterable[tuple[str, float, int]]) -> None:
        """Tell it numbers: name, value and step, as DeepSpeed's monitor is told them."""
        steps: dict[int, dict[str, float]] = {}
        for name, value, step in events:
            steps.setdefault(step, {})[name] = value
        for step, values in steps.items():
            self._run.log(values, step=step)

    def close(self) -> None:
        """Wait until all is written."""
        import trackio

        trackio.finish()


def rewind_tensorboard(monitor: Any, step: int) -> None:
    """Let TensorBoard forget what a run that was stopped had told of steps that are made again.

    Args:
        monitor: DeepSpeed's `MonitorMaster`, with TensorBoard or without, or nothing.
        step: the last one that stays.
    """
    writer = getattr(getattr(monitor, "tb_monitor", None), "summary_writer", None)
    if writer is not None:
        # the writer says so in the file that it opens with the next number
        writer.close()
        writer.purge_step = step + 1
