"""What the kernels of the ops take on a GPU, without the host: as JSON.

`python -m benchmarks.device results.json [NAME...]`, without TRITON_INTERPRET; a name is the start
of a case's. One call of an op, forward and backward in bf16, is profiled: the sum of its kernels,
the host's time beside it, and the floor by what a copy and a matrix product reach in the same run.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# inputs are those of the tests
sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))

from fastkd_kernels import (
    attention_divergence,
    attention_score_mse,
    hidden_cosine,
    hidden_mse,
    indexer_divergence,
    logits_divergence,
)
from kernel_cases import leaves_of

from benchmarks import costs
from benchmarks.conftest import measured_rates
from benchmarks.costs import Cost
from benchmarks.inputs import attention_inputs, hidden_inputs, indexer_inputs, logits_inputs
from benchmarks.workloads import ATTENTION, HIDDEN, INDEXER, LOGITS, on_device

ROUNDS = 10
FLUSH_BYTES = 256 << 20
BF16 = torch.bfloat16
Step = Callable[[], Any]

# op, workload, layer pairs
CASES = [
    *(
        (op, name, pairs)
        for op in ("attention_score_mse", "attention_divergence")
        for name, pairs in (
            ("bert-base-to-tinybert-4-128", 4),
            ("bert-base-to-tinybert-4-512", 4),
            ("bert-base-to-tinybert-4-2048", 4),
            ("bert-base-to-6-layers-512", 4),
            ("minilm-6-to-3-128", 4),
            ("llama-like-2048", 1),
        )
    ),
    ("hidden_mse", "bert-base-to-tinybert-4", 4),
    ("hidden_mse", "minilm-6-to-3", 4),
    ("hidden_mse", "llama-like-2048", 1),
    ("hidden_cosine", "bert-base-to-tinybert-4", 4),
    ("indexer_divergence", "indexer-gqa-2048", 1),
    ("indexer_divergence", "indexer-gqa-8192", 1),
    ("indexer_divergence", "indexer-mla-2048", 1),
    ("logits_divergence", "logits-32k-2048", 1),
    ("logits_divergence", "logits-128k-2048", 1),
    ("logits_divergence", "logits-128k-8192", 1),
]


class Case(NamedTuple):
    """One call of an op, and the least that it has to do."""

    step: Step
    cost: Cost


def _attention(op: Callable[..., Tensor], cost: Callable[..., Cost], name: str, pairs: int) -> Case:
    (work,) = on_device([ATTENTION[name]])
    student, teacher = attention_inputs(work, pairs, BF16, "cuda")
    leaves = leaves_of(student)
    return Case(
        lambda: torch.autograd.grad(op(student, teacher, causal=work.causal).sum(), leaves),
        cost(work, pairs, BF16),
    )


def _hidden(op: Callable[..., Tensor], name: str, pairs: int) -> Case:
    (work,) = on_device([HIDDEN[name]])
    case = hidden_inputs(work, pairs, BF16, "cuda")
    return Case(
        lambda: torch.autograd.grad(
            op(case.student, case.teacher, **case.trained).sum(), case.leaves
        ),
        costs.hidden(work, pairs, BF16),
    )


def _indexer(name: str, pairs: int) -> Case:
    (work,) = on_device([INDEXER[name]])
    case = indexer_inputs(work, pairs, BF16, "cuda")
    return Case(
        lambda: torch.autograd.grad(
            indexer_divergence(case.student, case.teacher, causal=work.causal).sum(), case.leaves
        ),
        costs.indexer_divergence(work, pairs, BF16),
    )


def _logits(name: str) -> Case:
    (work,) = on_device([LOGITS[name]])
    case = logits_inputs(work, BF16, "kl", "cuda")
    return Case(lambda: case.run(logits_divergence), costs.logits_divergence(work, 1, BF16))


def made(op: str, workload: str, pairs: int) -> Case:
    if op == "attention_score_mse":
        return _attention(attention_score_mse, costs.attention_score_mse, workload, pairs)
    if op == "attention_divergence":
        return _attention(attention_divergence, costs.attention_divergence, workload, pairs)
    if op == "indexer_divergence":
        return _indexer(workload, pairs)
    if op == "logits_divergence":
        return _logits(workload)
    return _hidden({"hidden_mse": hidden_mse, "hidden_cosine": hidden_cosine}[op], workload, pairs)


def kernel_microseconds(step: Step) -> dict[str, float]:
    """Microseconds of each kernel in one call, from inputs that are in no cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(ROUNDS):
            flush.zero_()
            step()
        torch.cuda.synchronize()
    taken: dict[str, float] = defaultdict(float)
    for event in recorded.events():
        # the flush is the only fill of bytes
        if event.device_type == DeviceType.CUDA and "FillFunctor<signed char>" not in event.name:
            taken[event.name[:100]] += event.device_time / ROUNDS
    return dict(sorted(taken.items(), key=lambda item: -item[1]))


def host_microseconds(step: Step) -> float:
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    return 1e6 * statistics.median(taken)


def measured(case: Case) -> dict[str, Any]:
    for _ in range(3):
        case.step()
    torch.cuda.synchronize()
    rates, kernels = measured_rates(), kernel_microseconds(case.step)
    floor = 1e6 * max(case.cost.bytes / rates["copy"], case.cost.flops / rates["products"])
    total = sum(kernels.values())
    return {
        "microseconds": round(total, 1),
        "floor_microseconds": round(floor, 1),
        "share_of_floor": round(floor / total, 3),
        "host_microseconds": round(host_microseconds(case.step)),
        "kernels": {name: round(value, 1) for name, value in kernels.items() if value >= 1.0},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("names", nargs="*", help="starts of cases' names; all unless given")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device is there")
    rates = measured_rates()
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_gigabytes_per_second": round(rates["copy"] / 1e9),
        "bf16_teraflops": round(rates["products"] / 1e12),
        "cases": {},
    }
    for op, workload, pairs in CASES:
        name = f"{op} {workload} x{pairs}"
        if not given.names or name.startswith(tuple(given.names)):
            found["cases"][name] = measured(made(op, workload, pairs))
            torch.cuda.empty_cache()
            given.results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
