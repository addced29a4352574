"""Forward and backward of attention_score_mse on the CPU, against its definition.

Both algorithms are timed, to show whether the one that callers get was the right choice.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastkd_kernels import attention_score_mse, reference
from fastkd_kernels.attention_score_mse import choose_algorithm
from kernel_cases import attention_states, errors, leaves_of

from benchmarks.workloads import ATTENTION, AttentionWorkload, on_cpu


@pytest.mark.parametrize("work", on_cpu(ATTENTION.values()), ids=lambda work: work.name)
def test_attention_score_mse(work: AttentionWorkload, compare: Callable[..., Any]) -> None:
    student, teacher = attention_states(
        1,
        work.batch,
        work.heads,
        work.tokens,
        work.dims,
        kv_heads=work.kv_heads,
        dtype=torch.float32,
    )
    leaves = leaves_of(student)

    def step(op: Callable[..., Any], **options: Any) -> Callable[[], list[torch.Tensor]]:
        def run() -> list[torch.Tensor]:
            loss = op(student, teacher, causal=work.causal, **options)
            return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

        return run

    functions = {
        "definition": step(reference.attention_score_mse),
        "tiles": step(attention_score_mse, algorithm="tiles"),
        "gram": step(attention_score_mse, algorithm="gram"),
    }
    expected = functions["definition"]()
    for name in ("tiles", "gram"):
        assert max(errors(functions[name](), expected)) <= 1e-5, name
    chosen = choose_algorithm(work.tokens, *work.dims, causal=work.causal, backend="torch")
    given = step(attention_score_mse)()
    assert all(map(torch.equal, given, functions[chosen]())), "auto runs what the chooser names"
    ratios = compare(
        chosen,
        functions,
        **work._asdict(),
        input_bytes=sum(t.nbytes for s in (*student, *teacher) for t in s[:2]),
        chosen=chosen,
    )
    # near the crossing both are as good, and timings spread
    assert min(ratios["tiles"], ratios["gram"]) >= 0.75
    if work.tokens == 2048:
        assert ratios["definition"] >= 20
