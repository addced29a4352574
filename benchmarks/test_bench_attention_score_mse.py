"""Forward and backward of attention_score_mse against its definition.

Both algorithms are timed, to show whether the one that callers get was the right choice.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastkd_kernels import attention_score_mse, reference
from fastkd_kernels.attention_score_mse.op import choose_algorithm
from kernel_cases import errors, leaves_of

from benchmarks import costs
from benchmarks.cases import Case, baselines, cases
from benchmarks.inputs import attention_inputs
from benchmarks.workloads import ATTENTION

MANY_PAIRS = ("bert-base-to-tinybert-4-128", "bert-base-to-tinybert-4-512")


@pytest.mark.parametrize("case", cases(ATTENTION.values(), many=MANY_PAIRS))
def test_attention_score_mse(case: Case, compare: Callable[..., Any]) -> None:
    work, on_cpu = case.work, case.device == "cpu"
    student, teacher = attention_inputs(work, case.pairs, case.dtype, case.device)
    leaves = leaves_of(student)

    def step(op: Callable[..., Any], **options: Any) -> Callable[[], list[torch.Tensor]]:
        def run() -> list[torch.Tensor]:
            loss = op(student, teacher, causal=work.causal, **options)
            return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

        return run

    backend = "torch" if on_cpu else "triton"
    chosen = choose_algorithm(work.tokens, *work.dims, causal=work.causal, backend=backend)
    algorithms = ("tiles", "gram")
    functions = baselines(step, reference.attention_score_mse, case.device)
    functions |= {name: step(attention_score_mse, algorithm=name) for name in algorithms}
    expected = functions["definition"]()
    for name in algorithms:
        assert max(errors(functions[name](), expected)) <= (1e-5 if on_cpu else 2e-2), name
    given = step(attention_score_mse)()
    assert all(map(torch.equal, given, functions[chosen]())), "auto runs what the chooser names"
    ratios = compare(
        chosen,
        functions,
        cost=costs.attention_score_mse(work, case.pairs, case.dtype),
        device=case.device,
        pairs=case.pairs,
        **work._asdict(),
        chosen=chosen,
    )
    # near the crossing both are as good, and timings spread
    assert min(ratios[name] for name in algorithms) >= 0.75
    if on_cpu and work.tokens == 2048:
        assert ratios["definition"] >= (10 if work.causal else 40)
