"""Forward and backward of attention_divergence, every kind, against its definition.

Relations run the same code on other tensors.
"""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from fastkd_kernels import AttentionDivergenceKind, attention_divergence, reference
from kernel_cases import errors, leaves_of

from benchmarks import costs
from benchmarks.cases import Case, baselines, cases
from benchmarks.inputs import attention_inputs
from benchmarks.workloads import ATTENTION

MANY_PAIRS = ("minilm-6-to-3-128",)
# elsewhere the default alone
EVERY_KIND = ("bert-base-to-tinybert-4-512", "minilm-6-to-3-512", "llama-like-1024")


@pytest.mark.parametrize("kind", get_args(AttentionDivergenceKind))
@pytest.mark.parametrize("case", cases(ATTENTION.values(), many=MANY_PAIRS))
def test_attention_divergence(case: Case, kind: Any, compare: Callable[..., Any]) -> None:
    work, on_cpu = case.work, case.device == "cpu"
    if on_cpu and kind != "kl" and work.name not in EVERY_KIND:
        pytest.skip("other kinds are timed at 512 tokens and on llama-like-1024")
    student, teacher = attention_inputs(work, case.pairs, case.dtype, case.device)
    leaves = leaves_of(student)

    def step(op: Callable[..., Any]) -> Callable[[], list[torch.Tensor]]:
        def run() -> list[torch.Tensor]:
            loss = op(student, teacher, kind=kind, causal=work.causal)
            return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

        return run

    functions = baselines(step, reference.attention_divergence, case.device)
    functions["op"] = step(attention_divergence)
    expected = functions["definition"]()
    assert max(errors(functions["op"](), expected)) <= (1e-4 if on_cpu else 2e-2)
    ratios = compare(
        "op",
        functions,
        cost=costs.attention_divergence(work, case.pairs, case.dtype),
        device=case.device,
        pairs=case.pairs,
        **work._asdict(),
        kind=kind,
    )
    if on_cpu and work.tokens == 512:
        assert ratios["definition"] >= 1 / 1.3
