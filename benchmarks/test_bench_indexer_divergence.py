"""Forward and backward of indexer_divergence, against its definition."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from fastkd_kernels import indexer_divergence, reference
from kernel_cases import errors

from benchmarks import costs
from benchmarks.cases import Case, baselines, cases
from benchmarks.inputs import indexer_inputs
from benchmarks.workloads import INDEXER


@pytest.mark.parametrize("case", cases(INDEXER.values()))
def test_indexer_divergence(case: Case, compare: Callable[..., Any]) -> None:
    work, on_cpu = case.work, case.device == "cpu"
    inputs = indexer_inputs(work, case.pairs, case.dtype, case.device)

    def step(op: Callable[..., Any]) -> Callable[[], list[torch.Tensor]]:
        def run() -> list[torch.Tensor]:
            loss = op(inputs.student, inputs.teacher, causal=work.causal)
            return [loss.detach(), *torch.autograd.grad(loss.sum(), inputs.leaves)]

        return run

    # at 8192 tokens the definition would hold some hundred maps of 128 MB: there the PyTorch path,
    # in linear memory, says what is right
    is_long = work.tokens > 2048
    functions = {} if is_long else baselines(step, reference.indexer_divergence, case.device)
    functions["op"] = step(indexer_divergence)
    right = step(partial(indexer_divergence, backend="torch"))
    expected = right() if is_long else functions["definition"]()
    assert max(errors(functions["op"](), expected)) <= (1e-4 if on_cpu else 2e-2)
    ratios = compare(
        "op",
        functions,
        cost=costs.indexer_divergence(work, case.pairs, case.dtype),
        device=case.device,
        pairs=case.pairs,
        **work._asdict(),
    )
    if on_cpu and work.tokens == 512:
        assert ratios["definition"] >= 1 / 1.3
