"""The next steps' inputs, prepared while one is trained on by a GPU.

A thread prepares them. A process would leave the training thread more to do, as it would have to
take every tensor out of a pipe (`benchmarks/feed.py` measures both); what holds the interpreter
lock for long, tokenising, has processes of its own (`workers.py`). What micro-batches hold besides
inputs, states of a teacher that come from a disk, is read by the same thread, so that no step waits
for a disk that keeps up.

Where the processor trains there is no such thread. It takes its time from the same cores, and a
second thread that computes makes OpenMP's workers sleep between one operation and the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch

from fastkd.data.datamodule import MicroBatches
from fastkd.types import LENGTHS, ROWS, STORED, Inputs

DEPTH = 2
"""Steps that are prepared ahead of a GPU."""
MOST_AHEAD = 2**30
"""Bytes that steps which are prepared may take on a GPU; of steps that would take more, a teacher's
stored states wait in pinned memory."""


@dataclass(frozen=True)
class _Prepared:
    """A step's inputs, and where the data stands after it."""

    inputs: Sequence[Inputs]
    copied: torch.cuda.Event | None
    """When they are on the device, where that is a GPU."""
    position: dict[str, Any]
    epoch: int


class Prefetched:
    """`MicroBatches` that a thread prepares ahead, on the device; on a CPU when they are asked for.

    Position and epoch are those of the steps that were asked for, not of those that are prepared;
    what goes wrong while a step is prepared is raised where that step is asked for. The thread
    draws from no generator of the process. It starts with the first step and lives until `close`.

    Ranks may exchange something for a step. So whatever was begun is finished, also where nobody
    wants it any more: ranks that have asked for the same steps have prepared the same ones, and
    who leaves earlier keeps no other waiting.
    """

    def __init__(
        self, micro_batches: MicroBatches, device: torch.device, depth: int | None = None
    ) -> None:
        """Take micro-batches over.

        Args:
            micro_batches: whose next step is the first one that will be asked for.
            device: that trains.
            depth: steps that a thread prepares ahead, 0 for no thread; of a GPU `DEPTH`, of a CPU
                none where not given.
        """
        self._micro_batches = micro_batches
        self._device = device
        self._depth = (0 if device.type == "cpu" else DEPTH) if depth is None else depth
        self._copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(1, "fastkd-data", _on, (device,))
        self._ahead: deque[Future[_Prepared]] = deque()
        self._stand()

    def _stand(self) -> None:
        self._position, self._epoch = self._micro_batches.state_dict(), self._micro_batches.epoch
        self._next: int | None = None

    @property
    def epoch(self) -> int:
        return self._epoch

    def next_step(self, step: int) -> Sequence[Inputs]:
        """The micro-batches of the next optimiser step, on the device; steps follow each other."""
        assert self._next in (None, step), f"step {step} asked for, {self._next} prepared"
        if self._depth:
            while len(self._ahead) <= self._depth:
                self._ahead.append(self._thread.submit(self._prepare, step + len(self._ahead)))
            prepared = self._ahead.popleft().result()
        else:
            prepared = self._prepare(step)
        self._next = step + 1
        self._position, self._epoch = prepared.position, prepared.epoch
        if prepared.copied is not None:
            self._hand_over(prepared.inputs, prepared.copied)
        return prepared.inputs

    def state_dict(self) -> dict[str, Any]:
        return self._position

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drop()
        self._micro_batches.load_state_dict(state)
        self._stand()

    def close(self) -> None:
        self._drop()
        self._thread.shutdown()
        self._micro_batches.close()

    def _drop(self) -> None:
        """Forget what is prepared; afterwards the thread does nothing."""
        wait(self._ahead)
        self._ahead.clear()

    def _prepare(self, step: int) -> _Prepared:
        inputs = [_read_by_models(part) for part in self._micro_batches.next_step(step)]
        position, epoch = self._micro_batches.state_dict(), self._micro_batches.epoch
        if self._copies is None:
            return _Prepared(inputs, None, position, epoch)
        size = sum(tensor.nbytes for part in inputs for tensor in part.values())
        waits = STORED if size * (1 + self._depth) > MOST_AHEAD else None
        with torch.cuda.stream(self._copies):
            # pinned memory is not used again before the copy out of it is done
            pinned = [{name: t.pin_memory() for name, t in part.items()} for part in inputs]
            moved = [self._moved(part, waits) for part in pinned]
            return _Prepared(moved, self._copies.record_event(), position, epoch)

    def _moved(self, pinned: Inputs, waits: str | None) -> Inputs:
        """On the device, but for lengths, and for what has a name that begins so."""
        return {
            name: tensor
            if name == LENGTHS or (waits is not None and name.startswith(waits))
            else tensor.to(self._device, non_blocking=True)
            for name, tensor in pinned.items()
        }

    def _hand_over(self, inputs: Sequence[Inputs], copied: torch.cuda.Event) -> None:
        """Let the stream that trains wait for the copies, without the host, and keep their memory
        until it has read them."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied)
        for part in inputs:
            for tensor in part.values():
                if tensor.is_cuda:
                    tensor.record_stream(stream)


def _on(device: torch.device) -> None:
    """Let a thread work on a GPU: of the first one, which it stands on, it would take memory."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _read_by_models(inputs: Inputs) -> Inputs:
    """Inputs without the numbers of their rows, which no step reads, and without a mask that hides
    nothing: only here it can be read without a wait, and attention without one is faster."""
    mask = inputs.get("attention_mask")
    idle = {ROWS} if mask is None or not mask.all() else {ROWS, "attention_mask"}
    return {name: tensor for name, tensor in inputs.items() if name not in idle}
