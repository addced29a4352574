"""Forward and backward of the ops on hidden states against their definitions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastkd_kernels import hidden_cosine, hidden_mse, reference
from kernel_cases import errors

from benchmarks import costs
from benchmarks.cases import Case, baselines, cases
from benchmarks.inputs import hidden_inputs, weights_of
from benchmarks.workloads import HIDDEN

MANY_PAIRS = ("bert-base-to-tinybert-4", "minilm-6-to-3")


@pytest.mark.parametrize("case", cases(HIDDEN.values(), many=MANY_PAIRS))
def test_hidden_mse(case: Case, compare: Callable[..., Any]) -> None:
    _run(hidden_mse, reference.hidden_mse, case, compare)


@pytest.mark.parametrize("case", cases(HIDDEN.values(), many=MANY_PAIRS))
def test_hidden_cosine(case: Case, compare: Callable[..., Any]) -> None:
    """And hidden_normalized_mse, which is the same op with another divisor."""
    _run(hidden_cosine, reference.hidden_cosine, case, compare)


def _run(
    op: Callable[..., Any], definition: Callable[..., Any], case: Case, compare: Callable[..., Any]
) -> None:
    work, on_cpu = case.work, case.device == "cpu"
    inputs = hidden_inputs(work, case.pairs, case.dtype, case.device)

    def step(function: Callable[..., Any]) -> Callable[[], list[torch.Tensor]]:
        def run() -> list[torch.Tensor]:
            loss = function(inputs.student, inputs.teacher, **inputs.trained)
            return [loss.detach(), *torch.autograd.grad(loss.sum(), inputs.leaves)]

        return run

    functions = {"op": step(op)} | baselines(step, definition, case.device)
    given, expected = functions["op"](), functions["definition"]()
    assert max(errors(given, expected)) <= (1e-5 if on_cpu else 2e-2)
    compare(
        "op",
        functions,
        cost=costs.hidden(work, case.pairs, case.dtype),
        device=case.device,
        pairs=case.pairs,
        **work._asdict(),
        weights=weights_of(work),
    )
