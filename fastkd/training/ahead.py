"""The teacher on the next micro-batch, on a stream of its own, while the student trains on this.

Only the order of launches changes: the teacher has no gradient and draws no numbers, so its states
are those that it would have left in turn. What it gains is what one model alone leaves idle of a
GPU: the ends of its kernels, and kernels too small to fill it. It never runs further ahead than one
micro-batch, nor into the next step, whose layers may be others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fastkd.capture import Capture
from fastkd.errors import UserError
from fastkd.training.dry_pass import tensors_of
from fastkd.training.teacher import TeacherRunner
from fastkd.types import Inputs


class TeacherAhead:
    """Runs a teacher one micro-batch ahead of whoever takes its states."""

    def __init__(self, teacher: TeacherRunner, device: torch.device) -> None:
        """Take a stream of a GPU.

        Args:
            teacher: whole, there.
            device: of the run.
        """
        self._teacher = teacher
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, batches: Iterable[Inputs]) -> Iterator[Capture]:
        """The states of each micro-batch of a step, in order, for the stream that is current; when
        they are taken, the next pass has been launched."""
        started: deque[tuple[Capture, Any]] = deque()
        for inputs in batches:
            started.append(self._start(inputs))
            if len(started) > 1:
                yield self._finished(*started.popleft())
        while started:
            yield self._finished(*started.popleft())

    def _start(self, inputs: Inputs) -> tuple[Capture, Any]:
        # inputs are there by then, and the student has read the last states but one, whose memory
        # this pass may take
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            return self._teacher(inputs), self._stream.record_event()

    def _finished(self, states: Capture, made: Any) -> Capture:
        current = torch.cuda.current_stream(self._device)
        # not for the stream, on which the next pass stands already
        current.wait_event(made)
        for tensor in tensors_of(states):
            # memory of the other stream's, kept until this one has read it
            tensor.record_stream(current)
        return states


def check_overlap(device: torch.device, accumulation: int) -> None:
    """See that a teacher can run ahead here.

    Args:
        device: of the run.
        accumulation: micro-batches of a step on each rank.

    Raises:
        UserError: it can't, and why.
    """
    if device.type != "cuda":
        raise UserError(
            f"teacher.overlap is on, but this run is on a {device.type.upper()}, which has no "
            "streams; take a GPU, or leave overlap out"
        )
    if accumulation == 1:
        raise UserError(
            "teacher.overlap is on, but a step is one micro-batch on each rank, and the teacher "
            "runs ahead within a step; give a smaller train.micro_batch_size, or leave overlap out"
        )
