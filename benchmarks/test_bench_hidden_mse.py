"""Forward and backward of hidden_mse on the CPU, against its definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastkd_kernels import hidden_mse, reference
from kernel_cases import errors, hidden_case

from benchmarks.workloads import HIDDEN, HiddenWorkload, on_cpu


@pytest.mark.parametrize("work", on_cpu(HIDDEN.values()), ids=lambda work: work.name)
def test_hidden_mse(work: HiddenWorkload, compare: Callable[..., Any]) -> None:
    weights = "none" if work.widths[0] == work.widths[1] else "shared+bias"
    case = hidden_case(1, work.batch, work.tokens, work.widths, weights, torch.float32)

    def step(op: Callable[..., Any]) -> Callable[[], list[torch.Tensor]]:
        def run() -> list[torch.Tensor]:
            loss = op(case.student, case.teacher, **case.trained)
            return [loss.detach(), *torch.autograd.grad(loss.sum(), case.leaves)]

        return run

    functions = {"op": step(hidden_mse), "definition": step(reference.hidden_mse)}
    assert max(errors(functions["op"](), functions["definition"]())) <= 1e-5
    compare(
        "op",
        functions,
        **work._asdict(),
        weights=weights,
        input_bytes=sum(t.nbytes for t in (*case.leaves, *case.teacher)),
    )
