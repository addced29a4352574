"""Random inputs of named workloads, those of the tests in the workload's shape."""

import sys
from pathlib import Path

import torch
from fastkd_kernels import AttentionState

# the inputs of the tests, also where pytest hasn't put their folder on the path
sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))

from indexer_cases import IndexerCase, indexer_case
from kernel_cases import HiddenCase, attention_states, errors, hidden_case
from logits_cases import LogitsCase, logits_case

from benchmarks.workloads import (
    AttentionWorkload,
    HiddenWorkload,
    IndexerWorkload,
    LogitsWorkload,
)

__all__ = [
    "attention_inputs",
    "errors",
    "hidden_inputs",
    "indexer_inputs",
    "logits_inputs",
    "weights_of",
]

States = list[AttentionState]


def attention_inputs(
    work: AttentionWorkload, pairs: int, dtype: torch.dtype, device: str
) -> tuple[States, States]:
    """Student and teacher states."""
    return attention_states(
        pairs,
        work.batch,
        work.heads,
        work.tokens,
        work.dims,
        kv_heads=work.kv_heads,
        dtype=dtype,
        device=device,
    )


def indexer_inputs(
    work: IndexerWorkload, pairs: int, dtype: torch.dtype, device: str
) -> IndexerCase:
    return indexer_case(
        pairs,
        work.batch,
        work.tokens,
        work.dims,
        index_heads=work.index_heads,
        heads=(work.heads, work.kv_heads),
        sinks=work.sinks,
        dtype=dtype,
        device=device,
    )


def weights_of(work: HiddenWorkload) -> str:
    """Which weights a case has: one projection for all pairs, or none where widths agree."""
    return "none" if work.widths[0] == work.widths[1] else "shared+bias"


def hidden_inputs(work: HiddenWorkload, pairs: int, dtype: torch.dtype, device: str) -> HiddenCase:
    case = hidden_case(pairs, work.batch, work.tokens, work.widths, weights_of(work), dtype)
    return case.on(device)


def logits_inputs(work: LogitsWorkload, dtype: torch.dtype, kind: str, device: str) -> LogitsCase:
    """Two heads without biases, every row counted."""
    return logits_case(
        (work.batch, work.tokens),
        ("head", "head"),
        vocabularies=(work.vocabulary, work.vocabulary),
        widths=work.widths,
        biases=(False, False),
        masked=False,
        dtype=dtype,
        device=device,
        kind=kind,
    )
