"""What the kernels of the ops take on a GPU, without the host.

A call, forward and backward in bf16, is profiled: the sum of its kernels stands beside the same
call replayed from a CUDA graph, the host's time, the floor by what a copy and a matrix product
reach in the same run, and the times of the op's definition. On the CPU, a dry run, clocks stand in.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import liger
from benchmarks.calls import Call, make_call
from benchmarks.inputs import errors
from benchmarks.timing import FLUSH_BYTES, device_events, floor_seconds, peak_bytes, seconds_of

ROUNDS = 10
DRY_TOKENS = 10
# against the definition in bf16
LARGEST_ERROR = 5e-2
Step = Callable[[], Any]


class Case(NamedTuple):
    """One timed call; of some the compiled definition is timed too."""

    op: str
    workload: str
    pairs: int
    kind: str | None = None
    compiled: bool = False

    @property
    def name(self) -> str:
        kind = "" if self.kind is None else f" {self.kind}"
        return f"{self.op}{kind} {self.workload} x{self.pairs}"

    def call(self, device: str) -> Call:
        """Its inputs; on the CPU tiny ones in fp32, since the interpreter multiplies no bf16."""
        options = {} if self.kind is None else {"kind": self.kind}
        where: dict[str, Any] = {"device": device}
        if device == "cpu":
            where |= {"dtype": torch.float32, "tokens": DRY_TOKENS}
        return make_call(self.op, self.workload, self.pairs, **where, **options)


CASES = (
    Case("attention_score_mse", "bert-base-to-tinybert-4-128", 4),
    Case("attention_score_mse", "bert-base-to-tinybert-4-512", 4, compiled=True),
    Case("attention_score_mse", "bert-base-to-tinybert-4-2048", 4),
    Case("attention_score_mse", "llama-like-2048", 1),
    Case("attention_divergence", "bert-base-to-tinybert-4-128", 4),
    Case("attention_divergence", "bert-base-to-tinybert-4-512", 4, compiled=True),
    Case("attention_divergence", "llama-like-2048", 1),
    Case("hidden_mse", "bert-base-to-tinybert-4", 4, compiled=True),
    Case("hidden_mse", "llama-like-2048", 1),
    Case("hidden_cosine", "bert-base-to-tinybert-4", 4),
    Case("indexer_divergence", "indexer-gqa-2048", 1),
    Case("logits_divergence", "logits-32k-2048", 1, "kl", compiled=True),
    Case("logits_divergence", "logits-32k-2048", 1, "js"),
    Case("logits_divergence", "logits-128k-2048", 1, "kl"),
)
# what a run has no time for, unless it is asked for these
MORE_CASES = (
    Case("attention_divergence", "bert-base-to-tinybert-4-2048", 4),
    *(
        Case("attention_divergence", f"bert-base-to-tinybert-4-{tokens}", 4, kind)
        for tokens in (128, 512, 2048)
        for kind in ("reverse_kl", "js", "mse", "cosine")
    ),
    *(Case("logits_divergence", "logits-32k-2048", 1, kind) for kind in ("reverse_kl", "skew_kl")),
)


def cases_of(starts: Sequence[str]) -> list[Case]:
    """The cases whose names start with one of these; `CASES` where none is given."""
    every = [*CASES, *MORE_CASES] if starts else CASES
    return [case for case in every if not starts or case.name.startswith(tuple(starts))]


def kernel_microseconds(step: Step, device: str) -> dict[str, float]:
    """Microseconds of each kernel in one call, from inputs that are in no cache."""
    if device == "cpu":
        return {"by the clock": 1e6 * seconds_of(step, device)}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(ROUNDS):
            flush.zero_()
            step()
        torch.cuda.synchronize()
    taken: dict[str, float] = defaultdict(float)
    for event in device_events(recorded.events()):
        # the flush is the only fill of bytes
        if "FillFunctor<signed char>" not in event.name:
            taken[event.name[:100]] += event.device_time / ROUNDS
    return dict(sorted(taken.items(), key=lambda item: -item[1]))


def host_microseconds(step: Step, device: str) -> float:
    """Until a call returns; its kernels may still run."""
    taken = []
    for _ in range(1 if device == "cpu" else ROUNDS):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
        if device != "cpu":
            torch.cuda.synchronize()
    return 1e6 * statistics.median(taken)


def graph_of(step: Step) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A call in a CUDA graph, and what it returns: the storage that replays write to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    return graph, made


def replayed_microseconds(step: Step) -> float:
    """One replay of the call from a CUDA graph, gaps between its kernels included."""
    graph, _made = graph_of(step)
    return 1e6 * statistics.median(seconds_of(graph.replay, "cuda") for _ in range(ROUNDS))


def others(case: Case, call: Call, device: str) -> dict[str, Step]:
    """What a call is held against, by name."""
    found: dict[str, Step] = {"definition": call.definition()}
    if case.compiled:
        found["compiled definition"] = compiled_definition(call, device)
    if case.kind is not None and liger.is_installed():
        found["liger"] = liger.liger_step(*call.arguments, call.leaves, case.kind)
    return found


def compiled_definition(call: Call, device: str) -> Step:
    """The definition under torch.compile; on the CPU inductor would need a C++ compiler."""
    # one shape each: after a few more, dynamo would give up and run it uncompiled
    torch._dynamo.reset()
    backend = "eager" if device == "cpu" else "inductor"
    return call.definition(lambda op: torch.compile(op, backend=backend))


def distance(step: Step, expected: list[torch.Tensor]) -> float:
    """The largest relative error of losses and gradients."""
    return max(errors(step(), expected))


def times_of(call: Call, device: str) -> dict[str, Any]:
    """Times of an op's own call, its floor and its memory."""
    kernels = kernel_microseconds(call.step, device)
    total, floor = sum(kernels.values()), 1e6 * floor_seconds(call.cost, device)
    return {
        "microseconds": round(total, 1),
        "floor_microseconds": round(floor, 1),
        "share_of_floor": round(floor / total, 3),
        "host_microseconds": round(host_microseconds(call.step, device)),
        "peak_megabytes": round(peak_bytes(call.step, device) / 1e6, 2),
        "kernels": {name: round(value, 1) for name, value in kernels.items() if value >= 1.0},
    }
