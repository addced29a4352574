"""Where the time of a step goes, by phase.

The loop says where phases begin and end, and a hook tells the losses from the forward pass that
they stand in. A moment is taken at each of these places, and what lies between two of them belongs
to the phase that was open; what no phase claims is the rest, so that all add up to the step. On
CUDA moments are events of the stream that trains. No step waits for one: they are read when a
window of metrics has been, which is after all of them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastkd.training.step_memory import StepMemory

PHASES = ("data", "teacher", "student", "losses", "backward", "optimiser")
REST = "rest"
_NOTHING = nullcontext()
_Cuts = list[tuple[str | None, list[Any]]]
"""Phases that began, with the moment by each clock; no phase where a step ends."""


class NoProfile:
    """Stand-in for a `Profile` where none is asked for."""

    def step(self) -> AbstractContextManager[None]:
        return _NOTHING

    def phase(self, name: str) -> AbstractContextManager[None]:
        return _NOTHING

    def collect(self) -> None:
        """Read nothing."""


@dataclass(frozen=True)
class Clock:
    """What takes moments, and how long it was between two of them."""

    name: str
    take: Callable[[], Any]
    seconds: Callable[[Any, Any], float]


def clocks_of(device: torch.device) -> list[Clock]:
    """The time of a device, then what its work costs the host: of a GPU the time that the host
    takes to start it, of a CPU the time of the processor, in which no other program's is."""

    def passed(start: float, stop: float) -> float:
        return stop - start

    if device.type != "cuda":
        processor = Clock("processor", time.process_time, passed)
        return [Clock("host", time.perf_counter, passed), processor]

    def event() -> torch.cuda.Event:
        taken = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        taken.record(torch.cuda.current_stream(device))
        return taken

    gpu = Clock("gpu", event, lambda start, stop: start.elapsed_time(stop) / 1e3)
    return [gpu, Clock("host", time.perf_counter, passed)]


class Profile:
    """Seconds of each phase over the steps of this process.

    A step with a larger micro-batch than any before it, as the first one is, has its memory looked
    at, and its time is left out: it is the one that compiles, allocates and counts.
    """

    def __init__(
        self, clocks: Sequence[Clock], losses: nn.Module, memory: StepMemory | None = None
    ) -> None:
        """Listen.

        Args:
            clocks: from `clocks_of`.
            losses: the module that computes them within the phase `student`.
            memory: what counts it; where not given, no step is left out.
        """
        self.memory = memory
        self.clocks = clocks
        self._open: str | None = None
        self._cuts: _Cuts = []
        self._steps: list[tuple[bool, _Cuts]] = []
        self._sums = {looked: _Sums(len(clocks)) for looked in (False, True)}
        losses.register_forward_pre_hook(lambda *_: self._move("student", "losses"))
        losses.register_forward_hook(lambda *_: self._move("losses", "student"))

    @contextmanager
    def step(self) -> Iterator[None]:
        """All of an optimiser step, from asking for its data to adding its losses."""
        self._cut(REST)
        yield
        self._cut(None)
        looked = self.memory is not None and self.memory.looked()
        self._steps.append((looked, self._cuts))
        self._cuts = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """One of `PHASES`, within a step."""
        self._cut(name)
        yield
        self._cut(REST)
        if name == "backward" and self.memory is not None:
            self.memory.look_at_gradients()

    def collect(self) -> None:
        """Add up the steps since the last call; the device must be known to have made them."""
        for looked, cuts in self._steps:
            self._sums[looked].add(cuts, self.clocks)
        self._steps = []

    @property
    def steps(self) -> int:
        """Steps that `seconds` is the mean of."""
        return self._told.steps

    def seconds(self) -> list[dict[str, float]]:
        """Mean seconds of a step by phase and for the rest; one mapping a clock. There must be
        `steps`."""
        told = self._told
        return [{name: s / told.steps for name, s in sums.items()} for sums in told.by_clock]

    @property
    def _told(self) -> _Sums:
        # a run of one step has no other
        return self._sums[not self._sums[False].steps]

    def _cut(self, phase: str | None) -> None:
        self._open = phase
        self._cuts.append((phase, [clock.take() for clock in self.clocks]))

    def _move(self, before: str, after: str) -> None:
        # an evaluation calls them, too
        if self._open == before:
            self._cut(after)


class _Sums:
    """Seconds of several steps, by clock and phase."""

    def __init__(self, clocks: int) -> None:
        self.steps = 0
        self.by_clock = [dict.fromkeys((*PHASES, REST), 0.0) for _ in range(clocks)]

    def add(self, cuts: _Cuts, clocks: Sequence[Clock]) -> None:
        self.steps += 1
        for (phase, start), (_, stop) in itertools.pairwise(cuts):
            if phase is not None:
                for number, clock in enumerate(clocks):
                    self.by_clock[number][phase] += clock.seconds(start[number], stop[number])
