"""Time and memory that a run takes, over all processes that work on it one after the other."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

from fastkd.distributed import Ranks


class Cost:
    """What a run has taken so far; the clock of this process starts with it."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        reset_peak(ranks)
        self._started = time.perf_counter()
        self._seconds = 0.0
        self._peak = 0

    @property
    def seconds(self) -> float:
        """Seconds of this process, and of those before it up to the checkpoints that were gone on
        from."""
        return self._seconds + time.perf_counter() - self._started

    @property
    def peak(self) -> int:
        """The largest peak of memory of any of them, in bytes, of what `peak_memory` measures."""
        return max(self._peak, peak_memory(self._ranks))

    @property
    def peak_of(self) -> str:
        """What the peak is of."""
        return "GPU" if self._ranks.device.type == "cuda" else "process"

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"seconds": self.seconds, "peak": self.peak, "peak_of": self.peak_of}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave in a process before."""
        self._seconds = state["seconds"]
        # the peak of another kind of memory compares with none here
        self._peak = state["peak"] if state["peak_of"] == self.peak_of else 0


def reset_peak(ranks: Ranks) -> None:
    """Let `peak_memory` tell of what follows, where that is a GPU's: a process has one peak, from
    its start on."""
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)


def peak_memory(ranks: Ranks) -> int:
    """Peak bytes of this rank: of the GPU, where there is one, since `reset_peak`, else of the
    process since it started."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranks.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
