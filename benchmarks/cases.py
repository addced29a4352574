"""Which workloads a benchmark runs, on which device, with how many layer pairs."""

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.workloads import PAIRS, on_cpu, on_device

# beyond this many tokens the definition of many pairs fills a GPU
MANY_PAIRS_TOKENS = 512


class Case(NamedTuple):
    """One workload with `batch` set for its device, and the number of layer pairs."""

    work: Any
    device: str
    pairs: int

    @property
    def dtype(self) -> torch.dtype:
        """What is timed: fp32 on the CPU, bf16 on a GPU."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16


def cases(workloads: Iterable[Any], *, many: Collection[str] = ()) -> list[Any]:
    """Parameters of one benchmark.

    On the CPU one pair, and for the workloads named in `many` 4 and 12 too; on a GPU, where there
    is one, 1, 4 and 12 up to 512 tokens.
    """
    works = list(workloads)
    made = [
        _parameter(Case(work, "cpu", pairs))
        for work in on_cpu(works)
        for pairs in (PAIRS if work.name in many else PAIRS[:1])
    ]
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    made += [
        _parameter(Case(work, "cuda", pairs), absent)
        for work in on_device(works)
        for pairs in (PAIRS if work.tokens <= MANY_PAIRS_TOKENS else PAIRS[:1])
    ]
    return made


def _parameter(case: Case, *marks: Any) -> Any:
    parts = [] if case.device == "cpu" else [case.device]
    parts.append(case.work.name)
    if case.pairs > 1:
        parts.append(f"{case.pairs}-pairs")
    return pytest.param(case, id="-".join(parts), marks=marks)


def baselines(
    step: Callable[[Callable[..., Any]], Callable[[], Any]],
    definition: Callable[..., Any],
    device: str,
) -> dict[str, Callable[[], Any]]:
    """The plain definition and, on a GPU, the compiled one; `step` makes a timed step of an op."""
    made = {"definition": step(definition)}
    if device != "cpu":
        # one shape each: after a few more, dynamo would give up and run it uncompiled
        torch._dynamo.reset()
        made["compiled definition"] = step(torch.compile(definition))
    return made
