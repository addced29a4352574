"""Every op with its jobs: what `machine_code.py` compiles and `floor.py` lists.

An op's module has `WORKLOADS`, the named workloads that it takes; `QUICK`, the names of those that
CI compiles, few but with every kernel and every form of it; and `jobs(work, dtype, on)`, the
kernels that one call, forward and backward, launches on backend `on` ("cuda" or "hip").
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from benchmarks import (
    jobs_attention_divergence,
    jobs_attention_score_mse,
    jobs_hidden,
    jobs_logits_divergence,
)
from benchmarks.machine_code import Job


class OpJobs(Protocol):
    """What a module `jobs_<op>.py` has."""

    WORKLOADS: tuple[Any, ...]
    QUICK: tuple[str, ...]

    def jobs(self, work: Any, dtype: torch.dtype, on: str) -> Iterator[Job]: ...


OPS: dict[str, OpJobs] = {
    "attention_score_mse": jobs_attention_score_mse,
    "attention_divergence": jobs_attention_divergence,
    "hidden": jobs_hidden,
    "logits_divergence": jobs_logits_divergence,
}
